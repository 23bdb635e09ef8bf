"""lseek and fallocate on a real mount, and what a mount does if pyfuse3 does not let us add them."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyfuse3
import pytest
import trio

from qedfs.mount import library_memory, more_operations
from qedfs.mount.more_operations import MoreOperations
from tests.harness.process import Child
from tests.harness.require import require

from .support import CLUSTER_SIZE, MIB, mounted_over, opened, origin

WORD = ctypes.sizeof(ctypes.c_void_p)


class Replied:
    """Stands for a function of libfuse that no test calls."""

    argtypes: Sequence[object] = ()


class Answers:
    """Handlers that do what the test says."""

    def __init__(self) -> None:
        self.replies: list[Callable[[int], None]] = []  # of fsyncs that are under way

    def write_now(self, handle: int, pos: int, data: memoryview) -> bool:
        return False

    def fsync_now(self, inode: int, reply: Callable[[int], None]) -> bool:
        if inode == 1:
            return False
        if inode == 2:
            raise ValueError("a bug")
        self.replies.append(reply)
        return True

    async def lseek(self, inode: int, pos: int, whence: int) -> int:
        if inode == 1:
            raise pyfuse3.FUSEError(errno.ENXIO)
        if inode == 2:
            raise ValueError("a bug")
        if inode == 3:
            await trio.sleep_forever()
        return pos + whence

    async def fallocate(self, inode: int, mode: int, pos: int, size: int) -> None:
        await trio.lowlevel.checkpoint()


# The pointer, and what happens without it.


def test_the_pointer_is_found_once_and_is_back_afterwards() -> None:
    library = ctypes.PyDLL(pyfuse3.__file__)
    regions = library_memory.memory_of(os.path.realpath(pyfuse3.__file__))
    pointer = more_operations._find_pointer(library, regions)
    word = ctypes.c_void_p.from_address(pointer.place)
    before = word.value
    more = MoreOperations(Answers())
    with more.offered():
        assert word.value != before
    assert word.value == before
    assert more.missing != ""  # no session was created meanwhile


@pytest.mark.expect_log("no SEEK_HOLE, no TRIM")
@pytest.mark.parametrize("count", [0, 2])
def test_without_exactly_one_pointer_nothing_is_changed(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    library = ctypes.PyDLL(pyfuse3.__file__)
    name = next(name for name in more_operations._NEW_SESSION if hasattr(library, name))
    words = (ctypes.c_void_p * 4)(*[library_memory.address_of(library, name)] * count)
    place = ctypes.addressof(words)
    monkeypatch.setattr(more_operations, "memory_of", lambda _: [(place, place + 4 * WORD, True)])
    before = list(words)
    more = MoreOperations(Answers())
    with more.offered():
        assert list(words) == before
    assert more.missing == f"pyfuse3 has {count} pointers to libfuse's fuse_session_new, not one"


@pytest.mark.parametrize("function", more_operations._NEW_SESSION)
def test_a_new_session_gets_our_handlers_and_none_for_writes_through_a_pipe(function: str) -> None:
    size = more_operations._LSEEK  # pyfuse3 may have been built for a libfuse without the last entries
    given: list[int | None] = list(range(1, size + 1))
    given[more_operations._FALLOCATE] = None
    seen: list[list[int | None]] = []

    def new_session(_: int, table: Any, size: int, *rest: int) -> int:
        seen.append(table[: size // WORD])
        return 5

    kind = more_operations._NEW_SESSION[function]
    replies = dict.fromkeys(("fuse_reply_err", "fuse_reply_lseek", "fuse_reply_write"), Replied())
    library = SimpleNamespace(**{function: kind(new_session)}, **replies)
    more = MoreOperations(Answers())
    hook = kind(more._hook(cast("ctypes.PyDLL", library), library_memory.Pointer(0, True, function)))
    table = (ctypes.c_void_p * size)(*given)
    rest = [0] * (len(kind._argtypes_) - 3)
    assert hook(0, ctypes.cast(table, ctypes.POINTER(ctypes.c_void_p)), size * WORD, *rest) == 5
    changed = {at for at, entry in enumerate(seen[0]) if entry != [*given, None][at]}
    ours = {more_operations._FSYNC, more_operations._FALLOCATE, more_operations._LSEEK, more_operations._WRITE}
    assert changed == ours | {more_operations._WRITE_BUF}
    assert seen[0][more_operations._WRITE_BUF] is None
    assert more.missing == ""


# One reply to each request.


class Replies:
    def __init__(self, more: MoreOperations) -> None:
        self.told: list[tuple[str, int]] = []
        self._more = more

    def ask(self, inode: int) -> None:
        self._more._start(
            lambda: Answers().lseek(inode, 5, 3),
            lambda found: self.told.append(("found", found)),
            lambda number: self.told.append(("error", number)),
        )


@pytest.mark.expect_log("internal error in a request")
async def test_each_request_has_one_reply() -> None:
    more = MoreOperations(Answers())
    replies = Replies(more)
    async with more.serving():
        for inode in (0, 1, 2):
            replies.ask(inode)
    assert sorted(replies.told) == [("error", errno.EIO), ("error", errno.ENXIO), ("found", 8)]


async def test_a_request_that_is_cancelled_has_its_reply_and_one_that_comes_too_late_too() -> None:
    more = MoreOperations(Answers())
    replies = Replies(more)
    with trio.CancelScope() as scope:
        async with more.serving():
            replies.ask(3)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
    assert replies.told == [("error", errno.EIO)]
    replies.ask(0)
    assert replies.told == [("error", errno.EIO)] * 2


async def test_the_end_waits_for_requests_in_flight() -> None:
    more = MoreOperations(Answers())
    replies = Replies(more)
    async with more.serving():
        replies.ask(0)
        assert replies.told == []
    assert replies.told == [("found", 8)]


@pytest.mark.expect_log("internal error in a request")
async def test_the_end_waits_for_fsyncs_whose_threads_have_not_replied() -> None:
    answers = Answers()
    more = MoreOperations(answers)
    told: list[int] = []
    assert not more._begin_fsync(0, told.append)  # nobody would wait for it
    async with trio.open_nursery() as nursery:
        async with more.serving():
            assert more._begin_fsync(0, told.append)
            assert not more._begin_fsync(1, told.append)
            assert not more._begin_fsync(2, told.append)
            assert more._begin_fsync(3, told.append)
            for reply in answers.replies:
                nursery.start_soon(trio.to_thread.run_sync, reply, errno.EIO)
            answers.replies.clear()
            assert told == []
        assert told == [errno.EIO] * 2


# The real thing.


def test_an_fsync_is_one_barrier_and_another_one_none(tmp_path: Path) -> None:
    with (
        origin(tmp_path) as source,
        mounted_over(tmp_path, source.url, "--no-stream") as mount,
        opened(mount.path("disk.raw")) as fd,
    ):
        os.pwrite(fd, b"x" * CLUSTER_SIZE, 0)
        os.fsync(fd)
        tracer = Child(
            [require("strace"), "-f", "-p", str(mount.pid), "-e", "trace=fdatasync"], tmp_path / "strace.log"
        )
        try:
            tracer.wait_until(lambda: "attached" in tracer.output(), "strace attached")
            for _ in range(5):
                os.pwrite(fd, b"y" * 4096, 0)
                os.fsync(fd)
                os.fdatasync(fd)
        finally:
            tracer.stop()
        assert tracer.output().count("fdatasync(") == 5


def test_a_program_sees_data_and_holes(tmp_path: Path) -> None:
    with origin(tmp_path) as source, mounted_over(tmp_path, source.url, "--no-stream") as mount:
        assert mount.status()["more_operations"] == {"answered": True, "error": None}
        with opened(mount.path("disk.raw")) as fd:
            assert os.lseek(fd, 5, os.SEEK_DATA) == 5
            assert os.lseek(fd, 5, os.SEEK_HOLE) == 16 * MIB
            for whence in (os.SEEK_DATA, os.SEEK_HOLE):
                with pytest.raises(OSError, match="No such device or address") as caught:
                    os.lseek(fd, 16 * MIB, whence)
                assert caught.value.errno == errno.ENXIO
        assert source.server.body_bytes() <= CLUSTER_SIZE
