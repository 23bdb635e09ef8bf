"""What contrib/bench measures, and how. Read in this order: values, lab, the contenders (ours, qemu, peers), rows, run.

Only public faces are measured: the command line, the mount, the control socket. Nothing here imports qedfs.
"""
