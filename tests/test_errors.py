"""Errors that are kept: each raise makes a new object, or its traceback would keep the buffers of all requests."""

from __future__ import annotations

import ast
import dataclasses
import errno
import re
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

import qedfs
from qedfs.errors import QedfsError, ReadOnlyOverlay, Reason, SourceChanged, SourceUnreachable, file_error
from qedfs.format.record import Pin, digest
from qedfs.jobs.stream import StreamJob
from tests.fakes.source import FakeSource
from tests.served import CLUSTER, served

PACKAGE = Path(qedfs.__file__).parent
CONTENT = b"s" * (8 * CLUSTER)
# The errors of a transfer are raised once each and never leave their package.
RAISED_ONCE = {"source/http/multi.py"}


def test_a_fresh_error_says_the_same_and_holds_nothing() -> None:
    kept = SourceUnreachable("away", reason=Reason.SERVER, retry_after_seconds=7)
    with pytest.raises(SourceUnreachable) as caught:
        raise kept from KeyError("cause")
    assert caught.value.__traceback__ is not None
    fresh = kept.fresh()
    assert (str(fresh), fresh.reason, fresh.retry_after_seconds) == ("away", Reason.SERVER, 7)
    assert type(fresh) is SourceUnreachable
    assert (fresh.__traceback__, fresh.__cause__, fresh.__context__) == (None, None, None)


def test_no_kept_error_is_raised_itself() -> None:
    found = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if raises_what_it_keeps(path)}
    assert found == RAISED_ONCE


def raises_what_it_keeps(path: Path) -> bool:
    """Whether there is a `raise something.error` in the file."""
    text = path.read_text()
    nodes = ast.walk(ast.parse(text)) if re.search(r"\braise\s+\S+\.\w", text) else ()
    return any(isinstance(node, ast.Raise) and isinstance(node.exc, ast.Attribute) for node in nodes)


async def frames(request: Callable[[], Awaitable[object]]) -> list[str]:
    """The functions in the traceback of the error that ends the request."""
    try:
        await request()
    except QedfsError as exc:
        return [frame.f_code.co_name for frame, _ in traceback.walk_tb(exc.__traceback__)][1:]
    raise AssertionError("it was no error")


async def same_each_time(request: Callable[[], Awaitable[object]]) -> None:
    """Met again and again, an error holds the frames of one request."""
    assert await frames(request) == [await frames(request) for _ in range(5)][-1]


async def test_reads_of_another_version_hold_nothing(autojump_clock: trio.testing.MockClock) -> None:
    async with served(FakeSource(CONTENT)) as image:
        await image.write(0, b"g" * CLUSTER)
        pin = Pin(digest("http://fake/disk.raw"), len(CONTENT), '"v0"')
        await image.overlay.change_record(lambda record: dataclasses.replace(record, pin=pin))
        with pytest.raises(SourceChanged):
            await image.read(CLUSTER, CLUSTER)
        await same_each_time(lambda: image.read(CLUSTER, CLUSTER))
        await same_each_time(image.source_size)
        await same_each_time(lambda: StreamJob(image).step(0))
        assert image.changed is not None
        assert image.changed.__traceback__ is None


async def test_reads_of_a_source_that_is_away_hold_nothing(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(CONTENT)
    async with served(source, deadline_seconds=1) as image:
        source.fail = SourceUnreachable("away", reason=Reason.CUT)
        with pytest.raises(SourceUnreachable) as caught:
            await image.read(CLUSTER, CLUSTER)
        assert caught.value.reason is Reason.CUT
        trouble = image.condition.worst
        assert trouble is not None
        assert image.fetch is not None
        assert image.fetch.remote.error is not None
        assert (trouble.error.__traceback__, image.fetch.remote.error.__traceback__) == (None, None)


async def test_requests_after_a_failed_barrier_hold_nothing(autojump_clock: trio.testing.MockClock) -> None:
    async with served(FakeSource(CONTENT)) as image:
        await image.write(0, b"g" * CLUSTER)
        image.overlay.storage.fail("barrier", QedfsError("EIO"))  # type: ignore[attr-defined]
        with pytest.raises(ReadOnlyOverlay):
            await image.flush()
        await same_each_time(lambda: image.write(CLUSTER, b"g" * CLUSTER))
        await same_each_time(image.flush)
        failure = image.overlay.failure
        assert failure is not None
        assert failure.__traceback__ is None
        with pytest.raises(ReadOnlyOverlay):
            await image.close()


@pytest.mark.parametrize(
    ("number", "exit_code"),
    [
        (errno.ENOENT, 2),
        (errno.ENOTDIR, 2),
        (errno.ENAMETOOLONG, 2),
        (errno.EACCES, 1),
        (errno.EROFS, 1),
        (errno.EIO, 1),
        (errno.EMFILE, 1),
    ],
)
def test_usage_is_only_what_the_command_line_says(number: int, exit_code: int) -> None:
    assert file_error("x.qed: ...", OSError(number, "")).exit_code == exit_code
