"""A program `qedfs` for shell scripts that asks the starter (`starter.py`) for a fork, and ends as that one ends.

Runs with `python -I -S`, so it loads a few modules of the standard library and nothing else. Its words: the number of
the descriptor that is the socket to the starter, then those of the command. The command has this program's streams,
environment and working folder, and gets the signals that this one gets. It is no child of the shell: what the shell
knows (a parent, a process group) is this program.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import sys

_NUMBER = struct.Struct("=i")  # as in starter.py
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _run(number: int, words: list[str]) -> int:
    """The exit status of the command."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)  # until it is known to whom
    report, theirs = os.pipe()
    request = {"words": words, "env": dict(os.environ), "cwd": os.getcwd(), "session": False, "mounts_of": None}
    with socket.socket(fileno=number) as starter:
        socket.send_fds(starter, [json.dumps(request).encode()], [0, 1, 2, theirs])
    os.close(theirs)
    (pid,) = _NUMBER.unpack(os.read(report, _NUMBER.size))
    for kind in _PASSED_ON:
        signal.signal(kind, lambda kind, _: os.kill(pid, kind))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
    status: int = _NUMBER.unpack(os.read(report, _NUMBER.size))[0]
    return 128 - status if status < 0 else status


if __name__ == "__main__":
    sys.exit(_run(int(sys.argv[1]), sys.argv[2:]))
