"""In-memory implementations of `Storage`: one that fails on request, and one that also records all operations.

Owns the bytes, the faults and the interleaving of worker threads. Must not know what the bytes mean. Both implement the
`Storage` port of `qedfs/overlay/storage.py`; `tests/overlay/test_storage.py` holds them to the same contract as the
real one.

Interleaving: with a seed, a call given to `in_thread` runs in a real thread that stops before every operation on the
file. The event loop then takes a seeded number of turns before it lets the thread go on. So other tasks run between any
two operations of a worker thread, exactly one of them runs at a time, and a seed repeats the whole history. There is
no clock in it, so it works under `trio.testing.MockClock` too.
"""

from __future__ import annotations

import os
import random
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import trio

from qedfs.errors import BadOverlay, QedfsError
from qedfs.format.geometry import MAX_FILE_SIZE, SECTOR_SIZE, round_down, round_up
from qedfs.overlay.storage import Buffer, ChangeMark, FileExtent

T = TypeVar("T")

_PAGE = 4096
_ZERO_PAGES = bytes(64 * _PAGE)
MOST_TURNS = 4  # of the event loop between two operations of a thread


class Written(NamedTuple):
    """Bytes that were handed to the page cache."""

    offset: int
    data: bytes


class Resized(NamedTuple):
    """A new length of the file."""

    size: int


class BarrierBegun(NamedTuple):
    """The barrier with this number has started. It does not cover writes after this point."""

    number: int


class BarrierEnded(NamedTuple):
    """Everything logged before the beginning of barrier `number` survives a power cut from now on."""

    number: int


class Lost(NamedTuple):
    """A barrier has failed. The disk did not take these pages, and keeps its previous content (offset, bytes)."""

    pages: tuple[tuple[int, bytes], ...]


class Marked(NamedTuple):
    """Something that a test wants to find in the log."""

    text: str


Entry = Written | Resized | BarrierBegun | BarrierEnded | Lost | Marked


class _Fault(NamedTuple):
    error: QedfsError
    nth: int
    forever: bool
    wrote: float


class _Steps:
    """A call in a thread of its own that stops before each of its operations."""

    current = threading.local()

    def __init__(self, function: Callable[[], object]) -> None:
        self._function = function
        self._go = threading.Semaphore(0)
        self._stopped = threading.Semaphore(0)
        self.ended = False
        self.result: object = None
        self.error: BaseException | None = None
        threading.Thread(target=self._run, daemon=True, name="storage steps").start()

    def _run(self) -> None:
        self._go.acquire()
        self.current.steps = self
        try:
            self.result = self._function()
        except BaseException as exc:
            self.error = exc
        self.ended = True
        self._stopped.release()

    def step(self) -> bool:
        """Let the thread run up to its next operation; False when the call has ended."""
        self._go.release()
        self._stopped.acquire()
        return not self.ended

    def stop_here(self) -> None:
        """Called in the thread: wait for the next step."""
        self._stopped.release()
        self._go.acquire()


class MemoryStorage:
    """A file in memory."""

    def __init__(
        self, data: bytes | bytearray = b"", *, name: str = "", writable: bool = True, seed: int | None = None
    ) -> None:
        self.path = "memory"
        self.bytes = bytearray(data)
        self.writable = writable
        self.locked = True
        self.device_number = 0  # of the file system that holds the file
        self.owner_number = os.getuid()
        self.written_ns = 10**18  # the mtime of the file, which nobody moves here
        self.closed = False
        self.left_bytes = 1 << 40  # of the file system; only told, never used up
        self.frozen = False  # until somebody waits for the thaw
        self.operations: Counter[str] = Counter()
        self.before_step: Callable[[], None] | None = None  # called before each operation of the overlay
        self.damage: BadOverlay | None = None
        self._foreign: BadOverlay | None = None
        self._length = len(self.bytes)  # that it must have
        self._changes = 0  # how often the file was changed
        self._covered = -1  # by a barrier
        self._name = name
        self._faults: dict[str, list[_Fault]] = {}
        self._random = None if seed is None else random.Random(seed)

    def fail(self, kind: str, error: QedfsError, *, nth: int = 1, forever: bool = False, wrote: float = 0.5) -> None:
        """Let the `nth` operation of a kind from now on fail, or all from there on.

        Kinds: read, write, resize, barrier, reserve. A write that fails has written this part of it, in whole sectors.
        """
        self._faults.setdefault(kind, []).append(_Fault(error, self.operations[kind] + nth, forever, wrote))

    def mend(self) -> None:
        """Stop failing operations."""
        self._faults.clear()

    # The port.

    def name(self) -> str:
        return self._name

    def device(self) -> int:
        return self.device_number

    def owner(self) -> int:
        return self.owner_number

    def stat(self) -> os.stat_result:
        status = (0o100600, 0, self.device_number, 1, self.owner_number, 0, len(self.bytes), 0, 0, 0)
        return os.stat_result(status, {"st_mtime_ns": self.written_ns, "st_blocks": -(-len(self.bytes) // 512)})

    def size(self) -> int:
        self._stop()
        return len(self.bytes)

    def condemn(self, error: BadOverlay) -> None:
        self.damage = self.damage or error
        self._foreign = error

    def check_length(self) -> None:
        if self.damage is None and len(self.bytes) < self._length:
            self.damage = BadOverlay(f"was truncated to {len(self.bytes)} bytes, of {self._length}")
        if self.damage is not None:
            raise self.damage.fresh()

    def modified_ns(self) -> int:
        return self.written_ns

    def change_mark(self) -> ChangeMark | None:
        return None

    def disk_usage(self) -> int:
        return len(self.bytes)

    def free_bytes(self) -> int:
        return self.left_bytes

    def read_now(self, offset: int, view: memoryview) -> bool:
        # With a seed, one read in three is not in the page cache.
        if offset + len(view) > len(self.bytes) or (self._random is not None and self._random.random() < 0.33):
            return False
        if self._foreign is not None:
            return False
        view[:] = memoryview(self.bytes)[offset : offset + len(view)]
        return True

    def read(self, offset: int, view: memoryview) -> None:
        self._begin("read")
        if self._foreign is not None:
            raise self._foreign.fresh()
        if offset + len(view) > len(self.bytes):
            self.check_length()
        found = memoryview(self.bytes)[offset : offset + len(view)]
        view[: len(found)] = found
        view[len(found) :] = bytes(len(view) - len(found))

    def extent(self, offset: int) -> FileExtent:
        """Pages of zeros are holes."""
        self._stop()
        page = self._not_zero(offset)
        if page >= len(self.bytes):
            self.check_length()
            return FileExtent(MAX_FILE_SIZE, hole=True)
        if page > offset:
            return FileExtent(page, hole=True)
        hole = self.bytes.find(bytes(_PAGE), offset)
        return FileExtent(len(self.bytes) if hole < 0 else round_up(hole, _PAGE), hole=False)

    def would_wait(self) -> bool:
        return self.frozen

    def wait_to_write(self) -> None:
        self._begin("wait")
        self.frozen = False  # the thaw has come

    def write(self, offset: int, data: Sequence[Buffer]) -> None:
        joined = b"".join(bytes(buffer) for buffer in data)
        fault = self._counted("write")
        if fault is None:
            self._put(offset, joined)
            return
        part = int(len(joined) * fault.wrote)
        self._put(offset, joined[: part if part == len(joined) else round_down(part, SECTOR_SIZE)])
        raise fault.error

    def resize(self, size: int) -> None:
        self._begin("resize")
        self._resized(size)

    def barrier(self) -> None:
        self._begin("barrier")
        self.check_length()
        self._sync()

    def _sync(self) -> None:
        self._covered = self._changes

    @property
    def unsynced(self) -> bool:
        return self._covered != self._changes or self.damage is not None or len(self.bytes) < self._length

    def refresh(self) -> None:
        self._begin("refresh")

    def punch(self, offset: int, size: int) -> bool:
        self._begin("punch")
        self._put(offset, bytes(size))
        return True

    def reserve(self, offset: int, size: int) -> None:
        self._begin("reserve")
        assert 0 <= offset <= offset + size

    def read_soon(self, offset: int, size: int) -> None:
        assert 0 <= offset < offset + size
        assert not self.extent(offset).hole

    def drop_cache(self, offset: int, size: int) -> None:
        assert 0 <= offset <= offset + size

    async def in_thread(self, function: Callable[[], T]) -> T:
        await trio.lowlevel.checkpoint()
        if self._random is None:
            return function()
        steps = _Steps(function)
        with trio.CancelScope(shield=True):
            while steps.step():
                for _ in range(self._random.randrange(MOST_TURNS)):
                    await trio.lowlevel.checkpoint()
        if steps.error is not None:
            raise steps.error
        return steps.result  # type: ignore[return-value]

    def begin_in_thread(self, function: Callable[[], None], ended: Callable[[Exception | None], None]) -> None:
        async def run() -> None:
            try:
                await self.in_thread(function)
            except Exception as exc:
                ended(exc)
            else:
                ended(None)

        trio.lowlevel.spawn_system_task(run)

    def close(self) -> None:
        self.closed = True

    # Inside.

    def _not_zero(self, offset: int) -> int:
        """The first page from `offset` on that is not all zeros, or `offset` in it; the length or more if none is."""
        with memoryview(self.bytes) as content:
            for step in (len(_ZERO_PAGES), _PAGE):  # a regular expression would look at each byte by itself
                while offset < len(content):
                    stop = round_down(offset, step) + step
                    if not _ZERO_PAGES.startswith(content[offset:stop]):
                        break
                    offset = stop
        return offset

    def _put(self, offset: int, data: bytes) -> None:
        self._changes += 1
        assert self.writable, "a write to a file that was opened for reading"
        self.check_length()
        if not data:
            return  # POSIX: it does not grow the file either
        if len(self.bytes) < offset:
            self.bytes.extend(bytes(offset - len(self.bytes)))
        self.bytes[offset : offset + len(data)] = data
        self._length = max(self._length, len(self.bytes))

    def _resized(self, size: int) -> None:
        assert self.writable, "a resize of a file that was opened for reading"
        self.check_length()
        self._changes += 1
        if size < len(self.bytes):
            del self.bytes[size:]
        else:
            self.bytes.extend(bytes(size - len(self.bytes)))
        self._length = size

    def _begin(self, kind: str) -> None:
        fault = self._counted(kind)
        if fault is not None:
            raise fault.error

    def _counted(self, kind: str) -> _Fault | None:
        """Count an operation, after it has waited for its turn, and tell which fault it meets."""
        assert not self.closed, f"{kind} after close"
        self._stop()
        self.operations[kind] += 1
        count = self.operations[kind]
        faults = self._faults.get(kind, [])
        return next((f for f in faults if count == f.nth or (f.forever and count > f.nth)), None)

    def _stop(self) -> None:
        if self.before_step is not None:
            self.before_step()
        steps = getattr(_Steps.current, "steps", None)
        if steps is not None:
            steps.stop_here()


class RecordingStorage(MemoryStorage):
    """A file in memory that records the order of writes and barriers."""

    def __init__(
        self, data: bytes | bytearray = b"", *, name: str = "", writable: bool = True, seed: int | None = None
    ) -> None:
        super().__init__(data, name=name, writable=writable, seed=seed)
        self.start = bytes(data)
        self.log: list[Entry] = []
        self._barriers = 0
        self._synced = bytes(data)  # what the last barrier that ended well has covered
        self._lost: dict[int, bytes] = {}  # offset of a page -> what the disk has, while the cache shows otherwise
        self._unreported = False  # whether the next barrier has to tell of a loss
        self._loss: tuple[int, random.Random, Callable[[], None]] | None = None

    def mark(self, text: str) -> None:
        """Put a line of the test into the log."""
        self.log.append(Marked(text))

    def lose_at(self, nth: int, rng: random.Random, on_loss: Callable[[], None]) -> None:
        """Let the `nth` barrier from now on fail, with some pages that the disk does not take; the cache keeps them.

        This is what ext4, XFS and btrfs do: the pages are clean afterwards, later barriers succeed without them, and a
        later write to such a page brings the whole page to the disk.
        """
        self._loss = (self.operations["barrier"] + nth, rng, on_loss)

    def lose_now(self, rng: random.Random, *, told: bool) -> None:
        """Simulate that the kernel fails to write some pages back. `told`: to another program, already."""
        self._unreported = self._lose(bytes(self.bytes), rng, forget=not told) and not told

    def _sync(self) -> None:
        number = self._barrier_begun()
        content, changes = bytes(self.bytes), self._changes
        # Other tasks may write while the disk works; none of that is covered.
        self._stop()
        if self._loss is not None and self.operations["barrier"] >= self._loss[0]:
            _, rng, on_loss = self._loss
            if self._lose(content, rng):
                self._loss = None
                on_loss()
                raise QedfsError("cannot sync: Input/output error")
        self._tell()
        self._synced, self._covered = content, changes
        self.log.append(BarrierEnded(number))

    def refresh(self) -> None:
        self._begin("refresh")
        number = self._barrier_begun()
        for offset in list(self._lost):
            self._forget(offset)
        self._synced = bytes(self.bytes)
        self.log.append(BarrierEnded(number))
        self._tell()

    def _barrier_begun(self) -> int:
        self._barriers += 1
        self.log.append(BarrierBegun(self._barriers))
        return self._barriers

    def _tell(self) -> None:
        unreported, self._unreported = self._unreported, False
        if unreported:
            raise QedfsError("cannot sync: Input/output error")

    def _lose(self, content: bytes, rng: random.Random, *, forget: bool = True) -> bool:
        """Lose some of the pages that differ from the last barrier, unless they were written to again meanwhile."""
        dirty = [
            offset
            for offset in range(0, len(content), _PAGE)
            if content[offset : offset + _PAGE] != self._synced[offset : offset + _PAGE]
            and content[offset : offset + _PAGE] == self.bytes[offset : offset + _PAGE]
        ]
        if not dirty:
            return False
        for offset in rng.sample(dirty, rng.randint(1, len(dirty))):
            size = min(_PAGE, len(content) - offset)
            self._lost[offset] = self._synced[offset : offset + size].ljust(size, b"\0")
        self.log.append(Lost(tuple(self._lost.items())))
        # The kernel may forget a clean page at any time.
        for offset in [offset for offset in self._lost if forget and rng.random() < 0.5]:
            self._forget(offset)
        return True

    def _forget(self, offset: int) -> None:
        old = self._lost.pop(offset)
        self.bytes[offset : offset + len(old)] = old

    def reopened(self, *, seed: int | None = None) -> RecordingStorage:
        """The same file, opened again. The log continues."""
        again = RecordingStorage(b"", name=self._name, seed=seed)
        again.start, again.bytes, again.log, again._barriers = self.start, self.bytes, self.log, self._barriers
        again._synced, again._lost, again._unreported = self._synced, self._lost, self._unreported
        again._length = len(self.bytes)
        again.before_step = self.before_step
        return again

    def _put(self, offset: int, data: bytes) -> None:
        super()._put(offset, data)
        if not data:
            return
        pages = range(round_down(offset, _PAGE), offset + len(data), _PAGE)
        if not any(self._lost.pop(page, None) is not None for page in list(pages)):
            self.log.append(Written(offset, data))
            return
        # Dirty again, and as a whole: what had been lost goes to the disk with it.
        for page in pages:
            self._lost.pop(page, None)
        start, stop = pages.start, min(round_up(pages.stop, _PAGE), len(self.bytes))
        self.log.append(Written(start, bytes(self.bytes[start:stop])))

    def _resized(self, size: int) -> None:
        super()._resized(size)
        self.log.append(Resized(size))
