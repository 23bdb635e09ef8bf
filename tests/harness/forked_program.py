"""A program `qedfs` for shell scripts that asks the starter (`starter.py`) for a fork, and ends as that one ends.

Runs with `python -I -S` and imports what is built into the interpreter only: `json`, `socket` and `signal` would take
two thirds of its processor time. Its words: the number of the descriptor that is the socket to the starter, then those
of the command. The command has this program's streams, environment and working folder, and gets the signals that this
one gets. It is no child of the shell: what the shell knows (a parent, a process group) is this program.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # typeshed has `signal` only
import _socket
import os
import sys

_PASSED_ON = (_signal.SIGINT, _signal.SIGTERM, _signal.SIGHUP)


def _run(number: int, words: list[str]) -> int:
    """The exit status of the command."""
    _signal.pthread_sigmask(_signal.SIG_BLOCK, _PASSED_ON)  # until it is known to whom
    report, theirs = os.pipe()
    request = {"words": words, "env": dict(os.environ), "cwd": os.getcwd(), "session": False, "mounts_of": None}
    starter = _socket.socket(fileno=number)
    fds = b"".join(fd.to_bytes(4, sys.byteorder) for fd in (0, 1, 2, theirs))
    starter.sendmsg([repr(request).encode()], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, fds)])
    starter.detach()
    os.close(theirs)
    pid = _number(report)
    for kind in _PASSED_ON:
        _signal.signal(kind, lambda kind, _: os.kill(pid, kind))
    _signal.pthread_sigmask(_signal.SIG_UNBLOCK, _PASSED_ON)
    status = _number(report)
    return 128 - status if status < 0 else status


def _number(report: int) -> int:
    """A number from the starter, as its `_NUMBER` packs it."""
    return int.from_bytes(os.read(report, 4), sys.byteorder, signed=True)


if __name__ == "__main__":
    sys.exit(_run(int(sys.argv[1]), sys.argv[2:]))
