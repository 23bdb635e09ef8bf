"""Standard input, output and error are there, whatever the caller has closed.

Owns the first three descriptors. Must not know what is printed.
"""

from __future__ import annotations

import contextlib
import os
import sys


def open_closed() -> None:
    """Open /dev/null in the place of each standard stream that is closed (`qedfs mount ... >&-`).

    Before anything else is opened: a pipe or socket that came to be descriptor 1 or 2 would be written over by what a
    library prints there, and would not survive the start of a child whose output goes elsewhere.
    """
    for number, mode in enumerate(("r", "w", "w")):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free descriptor: those below are open by now.
            os.open(os.devnull, os.O_RDONLY if mode == "r" else os.O_WRONLY)
            os.set_inheritable(number, True)
        # Python has none where the descriptor was closed.
        name = ("stdin", "stdout", "stderr")[number]
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115 - as long as the process


def drop_unwritten() -> None:
    """Put /dev/null in the place of an output that cannot be written (full, gone), at the end of a command.

    The command has told that already, or had nothing to say but remarks. Python 3.13.5 writes what is left in a buffer
    once more at its end, and ends with 120 if that fails, whatever the command's own code is; 3.11 does not.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream.fileno())
                os.close(null)
