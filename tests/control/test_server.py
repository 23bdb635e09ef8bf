"""Who may connect, what is left behind, and what bad clients can do: nothing."""

from __future__ import annotations

import contextlib
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
import trio
import trio.testing

from qedfs.control.qmp import server, session
from qedfs.control.qmp.server import MAX_CLIENTS, serve_control
from qedfs.control.qmp.session import QmpSession
from qedfs.errors import Inaccessible, InUse
from tests.harness.hang import HANG_SECONDS
from tests.harness.require import require_root

from .support import CLUSTER, FakeMount, MemorySource, Talk, controlled, talking

NOBODY = 65534

# Tries to read the greeting as another user; prints what came.
_STRANGER = """
import os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
s = socket.socket(socket.AF_UNIX)
try:
    s.connect(sys.argv[1])
    s.settimeout(10)
    print(len(s.recv(100)))
except PermissionError:
    print("denied")
"""


def as_nobody(path: Path) -> str:
    require_root()
    done = subprocess.run([sys.executable, "-c", _STRANGER, path], capture_output=True, text=True, check=True)
    return done.stdout.strip()


async def test_folder_and_socket_are_private(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (_, path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


async def test_other_users_are_refused(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (_, path):
        path.parent.parent.chmod(0o755)
        assert await trio.to_thread.run_sync(as_nobody, path) == "denied"


@pytest.mark.expect_log("a control client of user 65534 was refused")
async def test_other_users_are_refused_though_the_modes_let_them_in(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (_, path):
        path.parent.parent.chmod(0o755)
        path.parent.chmod(0o755)
        path.chmod(0o666)
        assert await trio.to_thread.run_sync(as_nobody, path) == "0"
        async with talking(path) as talk:
            assert "return" in await talk.ask("query-version")


async def test_the_socket_goes_with_the_server(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (_, path):
        assert path.exists()
    assert not path.exists()


async def test_what_a_dead_server_left_is_replaced(tmp_path: Path, nursery: trio.Nursery) -> None:
    path = tmp_path / "c" / "control.sock"
    path.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    await nursery.start(serve_control, path, FakeMount(tmp_path, nursery))
    async with talking(path) as talk:
        assert "return" in await talk.ask("query-version")


async def test_a_live_server_keeps_its_place(tmp_path: Path, nursery: trio.Nursery) -> None:
    async with controlled(tmp_path) as (mount, path):
        with pytest.RaisesGroup(InUse, allow_unwrapped=True, flatten_subgroups=True):
            await serve_control(path, mount)
        async with talking(path) as talk:
            assert "return" in await talk.ask("query-version")


async def test_a_file_in_the_place_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "c" / "control.sock"
    path.parent.mkdir(mode=0o700)
    path.write_text("precious")
    async with trio.open_nursery() as nursery:
        with pytest.RaisesGroup(Inaccessible, allow_unwrapped=True, flatten_subgroups=True):
            await serve_control(path, FakeMount(tmp_path, nursery))
    assert path.read_text() == "precious"


async def test_a_path_too_long_is_the_users_error(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        with pytest.raises(Inaccessible):
            await serve_control(tmp_path / ("x" * 100) / "control.sock", FakeMount(tmp_path, nursery))


async def test_a_socket_that_somebody_else_put_there_stays(tmp_path: Path) -> None:
    path = tmp_path / "c" / "control.sock"
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_control, path, FakeMount(tmp_path, nursery))
        path.unlink()
        await trio.sleep(0.02)  # the time of making counts in ticks of the kernel's clock
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))
        nursery.cancel_scope.cancel()
    assert path.is_socket()


# Bad clients.


async def test_half_a_message_holds_up_nobody_else(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (_, path), talking(path) as half, talking(path) as talk:
        await half.send('{"execute": "query-')
        assert "return" in await talk.ask("query-version")
        await half.send('version"}')
        assert "return" in await half.reply()


async def test_a_client_that_does_not_read_holds_up_nobody_else(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as deaf, talking(path) as talk:
        for index in range(20):
            await mount.add(f"disk{index}", None)
        with trio.move_on_after(0.2):
            while True:
                await deaf.send('{"execute": "query-qmp-schema"}')
        assert len(await talk.get("query-block")) == 20


async def test_a_client_that_never_reads_its_events_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "MAX_EVENTS", 256)
    async with controlled(tmp_path) as (mount, path), talking(path) as deaf, talking(path) as talk:
        await mount.add("disk", None)
        # The kernel's buffers take some, the server so many more; each job has seven.
        for _ in range(session.MAX_EVENTS // 7 + 500):
            await talk.get("block-stream", device="disk")
            await talk.events_until("null", "disk")
            talk.events.clear()
        with trio.fail_after(HANG_SECONDS), pytest.raises((EOFError, trio.BrokenResourceError)):
            await deaf.reply()  # it never comes; the connection ends instead


async def assert_ended(*talks: Talk) -> None:
    """The server hangs up; all that was sent to these clients has been read."""
    for talk in talks:
        with pytest.raises(EOFError):
            await talk.line()


async def assert_open(*talks: Talk) -> None:
    """The server has not hung up."""
    for talk in talks:
        with trio.move_on_after(0.05) as silence:
            await talk.line()
        assert silence.cancelled_caught


@contextlib.asynccontextmanager
async def a_full_house(path: Path, first: Sequence[Talk] = ()) -> AsyncIterator[list[Talk]]:
    """As many clients as there may be: those that are given, and others that have taken their greeting."""
    talks = [*first]
    try:
        while len(talks) < MAX_CLIENTS:
            talks.append(Talk(await trio.open_unix_socket(str(path))))
            await talks[-1].line()
        yield talks
    finally:
        for talk in talks:
            await talk.stream.aclose()


async def test_a_client_too_many_takes_the_place_of_the_oldest_without_negotiation(tmp_path: Path) -> None:
    async with (
        controlled(tmp_path) as (_, path),
        talking(path) as first,
        a_full_house(path, [first]) as talks,
        talking(path) as newcomer,
        talking(path),
    ):
        assert "return" in await newcomer.ask("query-version")
        await assert_ended(*talks[1:3])
        await assert_open(talks[0], talks[3])


async def test_a_client_too_many_takes_the_place_of_the_one_that_was_silent_longest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "MAX_CLIENTS", 3)
    async with (
        controlled(tmp_path) as (mount, path),
        talking(path) as at_work,
        talking(path) as speaking,
        talking(path) as silent,
    ):
        source = MemorySource(bytes(CLUSTER))
        source.gate = trio.Event()
        await mount.add("disk", source)
        await at_work.send('{"execute": "x-qedfs-step", "arguments": {"device": "disk"}}')
        await source.asked.wait()
        await speaking.get("query-version")
        async with talking(path) as newcomer:
            assert "return" in await newcomer.ask("query-version")
            await assert_ended(silent)
            await assert_open(at_work, speaking)
            source.gate.set()
            assert "return" in await at_work.reply()


async def test_a_client_may_be_dropped_while_an_event_is_being_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    async def execute(*_: object) -> None:
        return

    ours, theirs = trio.socket.socketpair()
    stream = trio.SocketStream(ours)
    talk = QmpSession(stream, execute)
    talk.negotiated = True
    send_all = stream.send_all

    async def send_and_drop(line: bytes) -> None:
        await send_all(line)
        if b"event" in line:
            talk.drop()

    monkeypatch.setattr(stream, "send_all", send_and_drop)
    with theirs, trio.fail_after(HANG_SECONDS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(talk.run, {"QMP": {}})
            await trio.testing.wait_all_tasks_blocked()
            talk.post(b'{"event": "X"}\r\n')
        received = b""
        while data := await theirs.recv(1000):
            received += data
    assert received.endswith(b'{"event": "X"}\r\n')


@pytest.mark.expect_log("a control client is dropped: internal error")
async def test_a_fault_of_ours_costs_its_client_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with controlled(tmp_path) as (_, path), talking(path) as talk:
        with monkeypatch.context() as patch:
            patch.setattr(session, "Reader", lambda: 1 / 0)
            async with await trio.open_unix_socket(str(path)) as stream:
                unlucky = Talk(stream)
                await unlucky.line()
                with pytest.raises(EOFError):
                    await unlucky.line()
        assert "return" in await talk.ask("query-version")


async def test_the_last_events_are_sent_when_the_mount_ends(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path):
        await mount.add("disk", None)
        talk = Talk(await trio.open_unix_socket(str(path)))
        await talk.line()
        await talk.get("qmp_capabilities")
        await talk.send('{"execute":"block-stream","arguments":{"device":"disk"}}')
        await talk.reply()
    await talk.events_until("null", "disk")
    with pytest.raises(EOFError):
        await talk.line()
    await talk.stream.aclose()
