"""Whatever a handler meets becomes an errno, and one line in the log."""

from __future__ import annotations

import errno
import logging

import pyfuse3
import pytest
import trio.testing

from qedfs.errors import BadOverlay, NoSpace, ReadOnlyOverlay, SourceUnreachable, UsageError
from qedfs.mount.fuse_errors import LOG_SECONDS, MOST_REMEMBERED, FailureReplies

EXPECTED = [
    (NoSpace("no room"), errno.ENOSPC, logging.ERROR),
    (ReadOnlyOverlay("as it is"), errno.EROFS, logging.ERROR),
    (SourceUnreachable("away"), errno.EIO, logging.WARNING),
    (BadOverlay("cut"), errno.EIO, logging.ERROR),
    (UsageError("no such scheme"), errno.EIO, logging.ERROR),  # not EINVAL, which would blame the reader
    (OSError(errno.ESTALE, "stale"), errno.ESTALE, logging.ERROR),
    (OSError("without a number"), errno.EIO, logging.ERROR),
    (RuntimeError("a fault of ours"), errno.EIO, logging.ERROR),
]


@pytest.mark.parametrize(("exc", "number", "level"), EXPECTED, ids=[repr(one[0]) for one in EXPECTED])
async def test_each_error_has_a_number_and_a_line(
    exc: Exception, number: int, level: int, caplog: pytest.LogCaptureFixture
) -> None:
    assert FailureReplies().reply(exc, "disk.raw").errno == number
    ((_, found, text),) = caplog.record_tuples
    assert found == level
    assert text.startswith("disk.raw: ")


async def test_a_reply_stays_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    reply = pyfuse3.FUSEError(errno.ENOENT)
    assert FailureReplies().reply(reply, "disk.raw") is reply
    assert not caplog.records


async def test_one_trouble_is_logged_once_in_a_while(
    caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    replies = FailureReplies()
    for _ in range(3):
        replies.reply(NoSpace("no room"), "a.raw")
        replies.reply(NoSpace("no room"), "b.raw")
    assert [record.getMessage() for record in caplog.records] == ["a.raw: no room", "b.raw: no room"]
    await trio.sleep(LOG_SECONDS)
    replies.reply(NoSpace("no room"), "a.raw")
    assert len(caplog.records) == 3


async def test_no_more_is_remembered_than_there_is_room_for(caplog: pytest.LogCaptureFixture) -> None:
    replies = FailureReplies()
    for number in range(2 * MOST_REMEMBERED):
        replies.reply(NoSpace(f"no room for {number}"), "a.raw")
    assert len(replies._logged) <= MOST_REMEMBERED + 1
