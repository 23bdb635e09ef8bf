"""The part of one server in a change of servers. `test_holder.py` does it with real ones."""

from __future__ import annotations

import struct

import pytest
import trio
import trio.testing

from qedfs.errors import QedfsError
from qedfs.mount.held import ALIVE_SECONDS, HolderLink, Taken
from qedfs.mount.takeover import Takeover

from .test_held import linked

pytestmark = pytest.mark.usefixtures("autojump_clock")
RESUMED = Taken(-1, {"token": "ab" * 8, "lost": "disk.raw: the disk is full"}, "SIGKILL", 1, 0.0, {"killed": 1})
INIT = struct.pack("=II48x", 56, 26)  # as a kernel sends it that does not repeat requests


async def test_whoever_asks_for_an_upgrade_gets_the_answer_before_the_connection_ends() -> None:
    with linked() as (link, holder):
        takeover = Takeover(link, None)
        takeover._request = INIT
        answered: list[bool] = []

        async def ask() -> None:
            await takeover.upgrade("mnt")
            answered.append(not takeover.handing)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked()
            assert holder.recv(100) == b"upgrade"
            holder.send(b"hand")
            assert await takeover.hear() is None
        assert takeover.handing
        assert answered == [True]


async def test_the_holder_hears_that_the_event_loop_turns_until_requests_are_answered(
    autojump_clock: trio.testing.MockClock,
) -> None:
    with linked() as (link, holder):
        takeover = Takeover(link, None)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(takeover.beat)
            await trio.sleep(2.5 * ALIVE_SECONDS)
            takeover.serve()
        assert [holder.recv(100) for _ in range(4)] == [b"alive"] * 3 + [b"serving"]


@pytest.mark.expect_log("the new server could not start: it is too new")
async def test_a_new_server_that_fails_is_an_error_and_this_one_goes_on() -> None:
    with linked() as (link, holder):
        takeover = Takeover(link, None)
        takeover._request = INIT
        async with trio.open_nursery() as nursery:
            nursery.start_soon(takeover.hear)
            holder.send(b"failed it is too new")
            with pytest.raises(QedfsError, match="serves on: it is too new"):
                await takeover.upgrade("mnt")
            assert not takeover.handing
            nursery.cancel_scope.cancel()


@pytest.mark.expect_log("the new server could not start: it is too new")
async def test_all_who_ask_for_an_upgrade_get_an_answer() -> None:
    with linked() as (link, holder):
        takeover = Takeover(link, None)
        takeover._request = INIT
        failures: list[str] = []

        async def ask() -> None:
            try:
                await takeover.upgrade("mnt")
            except QedfsError as exc:
                failures.append(str(exc))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(takeover.hear)
            nursery.start_soon(ask)
            nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked()
            holder.send(b"failed it is too new")
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
    assert len(failures) == 2


async def test_the_end_of_the_holder_is_an_error() -> None:
    with linked() as (link, holder):
        takeover = Takeover(link, None)
        holder.close()
        error = await takeover.hear()
        assert "the holder of the mount was killed" in str(error)


async def test_all_sessions_of_a_mount_begin_alike() -> None:
    with linked() as (link, _):
        first = Takeover(link, None).session_prefix()
        assert len(first) == 16
        assert Takeover(link, RESUMED).session_prefix() == "ab" * 8


async def test_what_an_earlier_server_has_lost_is_told_at_the_end() -> None:
    with linked() as (link, _):
        assert [str(loss) for loss in Takeover(link, RESUMED).losses()] == ["disk.raw: the disk is full"]
        assert not Takeover(link, None).losses()


def test_it_is_known_what_a_crash_of_the_server_means() -> None:
    with linked() as (link, _):
        assert "--no-restart" in Takeover(HolderLink(), None).without_restart
        takeover = Takeover(link, None)
        assert not takeover.survives_crash
        takeover._request = b"of a libfuse that did this while it mounted"
        assert "no other server can continue" in takeover.without_upgrade
        takeover._request = INIT
        takeover.serving = True
        assert (takeover.without_upgrade, "does not repeat" in takeover.without_restart) == ("", True)
        assert not takeover.survives_crash
        takeover._request = struct.pack("=II48xI", 60, 26, 1 << 7)  # FUSE_HAS_RESEND
        assert takeover.survives_crash
