"""Divides work among several processes: this one, and others that it forks.

Owns the processes, and who does which part. Must not know what the work is. It is for computation in Python, which
threads would do on one processor, because they share the interpreter's lock.

Each process has a copy of all memory as it was, and the same open files. So call this before there are threads, whose
locks would stay locked in the copies. A process takes the next part when it has done one, so a process that is given
less processor time does fewer parts.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence

_READ_BYTES = 1 << 20

Work = Callable[[Iterator[int]], bytes]


def share_out(parts: Sequence[int], processes: int, work: Work) -> list[bytes] | None:
    """Call `work` in each of `processes`, this one included, with the parts that are its share.

    Returns what the calls have returned, this process's first; None if another process has failed, in any way. If no
    more processes can be made, those that exist do everything. Raises what `work` raises here. For the main thread.

    `parts`: numbers below 256, since each is a byte in a pipe. Each is handed out once, in order.
    """
    numbers, to_tell = os.pipe()
    with contextlib.ExitStack() as stack:
        if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:  # inherited; waitpid(2) would not tell how they end
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            stack.callback(signal.signal, signal.SIGCHLD, signal.SIG_IGN)
        stack.callback(os.close, numbers)
        with open(to_tell, "wb", buffering=0) as file:
            file.write(bytes(parts))
        others: list[_Other] = []
        with contextlib.suppress(OSError):  # no more processes, or no memory
            for _ in range(processes - 1):
                others.append(stack.enter_context(_Other(work, numbers)))  # noqa: PERF401 - an error keeps some
        found = [work(_told(numbers)), *(other.result() for other in others)]
    results = [result for result in found if result is not None]
    return results if len(results) == len(found) else None


def _told(numbers: int) -> Iterator[int]:
    while number := os.read(numbers, 1):
        yield number[0]


class _Other:
    """Another process, which is killed at the end of the block if it still runs."""

    def __init__(self, work: Work, numbers: int) -> None:
        parent = os.getpid()
        self._result, to_write = os.pipe()
        try:
            self._pid = os.fork()
        except OSError:
            os.close(self._result)
            os.close(to_write)
            raise
        if not self._pid:
            _be_other(work, _until_orphaned(numbers, parent), to_write)
        os.close(to_write)

    def __enter__(self) -> _Other:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._result)
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)

    def result(self) -> bytes | None:
        """What its call has returned; None if it failed."""
        found = b"".join(iter(lambda: os.read(self._result, _READ_BYTES), b""))
        pid, self._pid = self._pid, 0
        return None if os.waitpid(pid, 0)[1] else found


def _until_orphaned(numbers: int, parent: int) -> Iterator[int]:
    """The numbers of parts. Ends this process if its parent has ended: it would keep the locks of the open files."""
    for number in _told(numbers):
        if os.getppid() != parent:
            os._exit(1)
        yield number


def _be_other(work: Work, numbers: Iterator[int], to_write: int) -> None:
    """Do the work of another process, and end. Nothing that was copied by the fork is closed or flushed."""
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the first process handles Ctrl-C, and then kills this one
        result = memoryview(work(numbers))
        while result:
            result = result[os.write(to_write, result) :]
        code = 0
    finally:
        os._exit(code)
