"""Standard input, output and error: they are open, even if the caller has closed them.

Owns the first three descriptors. Must not know what is printed.
"""

from __future__ import annotations

import contextlib
import os
import sys


def open_closed() -> None:
    """Open /dev/null for each standard stream that is closed (`qedfs mount ... >&-`).

    Call this before anything else is opened. Otherwise a pipe or socket could become descriptor 1 or 2: libraries that
    print there would write into it, and redirecting the output of a child would close it.
    """
    for number, mode in enumerate(("r", "w", "w")):
        try:
            os.fstat(number)
        except OSError:
            # open(2) gives the lowest free descriptor, which is `number`.
            os.open(os.devnull, os.O_RDONLY if mode == "r" else os.O_WRONLY)
            os.set_inheritable(number, True)
        # Python sets it to None if the descriptor was closed.
        name = ("stdin", "stdout", "stderr")[number]
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115 - as long as the process


def drop_unwritten() -> None:
    """At the end of a command, redirect an output that cannot be written (full disk, closed pipe) to /dev/null.

    By then the command has reported the error, or had only remarks to print. Python 3.13.5 tries once more to write its
    buffers at exit, and exits with 120 if that fails, whatever the command's own status; 3.11 does not.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream.fileno())
                os.close(null)
