"""What a server and the holder of its mount say to each other, over a real socket."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
from collections.abc import Iterator

import pytest
import trio

from qedfs.errors import QedfsError
from qedfs.mount import held
from qedfs.mount.held import HolderGone, HolderLink


@contextlib.contextmanager
def linked(kept: str | None = None) -> Iterator[tuple[HolderLink, socket.socket]]:
    """A link, and the holder's end of its socket. `kept`: the format of what that keeps, for a server that asks."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(60)
    with ours:
        if kept is not None:
            ours.send(f"state {kept}".strip().encode())
        link = HolderLink(theirs.detach())
        yield link, ours
        link.close()


def taken(holder: socket.socket, values: dict[str, str], told: dict[str, object]) -> None:
    """Passes a mount on, as the holder does."""
    fd = os.memfd_create("values")
    os.write(fd, json.dumps(values).encode())
    socket.send_fds(holder, [f"take {json.dumps(told)}".encode()], [fd, fd])
    os.close(fd)


def heard(holder: socket.socket, count: int) -> list[str]:
    return [holder.recv(1000).decode() for _ in range(count)]


def unsent(link: HolderLink) -> list[bytes]:
    """The lines in the memory that the holder has."""
    return os.pread(link._overflow, 1 << 20, 0).splitlines()


def test_the_first_server_makes_the_mount_and_tells_what_the_next_one_needs() -> None:
    with linked("") as (link, holder):
        holder.send(b"mount")
        assert link.turn() is None
        for value in ("1", "1", "2"):
            link.set("opens/5", value)
        link.drop("opens/5")
        link.drop("opens/5")
        assert heard(holder, 5) == [
            "ready",
            f"set format {held.FORMAT}",
            "set opens/5 1",
            "set opens/5 2",
            "del opens/5",
        ]


def test_the_next_server_gets_the_mount_with_all_values() -> None:
    with linked("") as (link, holder):
        taken(holder, {"format": held.FORMAT, "a": "b"}, {"reason": "SIGKILL", "restarts": 3, "since": 7.5})
        found = link.turn()
        assert found is not None
        assert (dict(found.values), found.reason) == ({"format": held.FORMAT, "a": "b"}, "SIGKILL")
        assert (found.restarts, found.since) == (3, 7.5)
        link.set("a", "b")  # known to the holder already
        link.set("a", "c")
        assert heard(holder, 2) == ["ready", "set a c"]
        os.close(found.fd)


def test_a_handed_mount_has_paused_when_its_server_began_to_hand_it_over() -> None:
    with linked("") as (link, holder):
        taken(holder, {"format": held.FORMAT, "paused": "5.0"}, {"reason": "an upgrade", "restarts": 1, "since": 7.5})
        found = link.turn()
        assert found is not None
        assert found.since == 5.0
        assert heard(holder, 2) == ["ready", "del paused"]  # or a later crash would count from then
        os.close(found.fd)


def test_a_server_that_cannot_read_the_values_says_so_before_it_is_ready() -> None:
    with linked("7") as (link, holder):
        with pytest.raises(QedfsError, match="another version of qedfs has left a state of format 7"):
            link.turn()
        holder.setblocking(False)
        with pytest.raises(BlockingIOError):
            holder.recv(1000)


def test_a_server_that_reads_an_older_format_tells_the_next_one_in_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held, "READABLE", {"0", held.FORMAT})
    with linked("0") as (link, holder):
        taken(holder, {"format": "0", "a": "b"}, {"reason": "SIGKILL", "restarts": 1, "since": 7.5})
        found = link.turn()
        assert found is not None
        assert heard(holder, 2) == ["ready", f"set format {held.FORMAT}"]
        os.close(found.fd)


def test_without_a_holder_nothing_is_sent() -> None:
    link = HolderLink()
    assert link.turn() is None
    link.set("a", "b")
    link.tell("serving")
    link.finish("over")
    assert not link


def test_a_holder_that_does_not_read_delays_nobody_and_misses_nothing() -> None:
    with linked("") as (link, holder):
        holder.send(b"mount")
        link.turn()
        for number in range(5000):  # more than fits into the socket
            link.set("opens/5", str(number))
        assert heard(holder, 3)[2] == "set opens/5 0"
        link.tell("serving")
        said = ""
        count = 0
        while said != "serving":
            said = holder.recv(1000).decode()
            link.tell("more") if count == 0 else link.flush()
            count += 1
        assert count == 5000


def test_the_mount_reaches_a_holder_that_was_behind() -> None:
    with linked("") as (link, holder):
        holder.send(b"mount")
        link.turn()
        for number in range(5000):
            link.set("opens/5", str(number))
        fd = os.memfd_create("the mount")
        link.keep(fd)
        os.close(fd)
        descriptors: list[int] = []
        assert holder.recv(1000) == b"ready"
        while not descriptors:
            said, descriptors, _, _ = socket.recv_fds(holder, 1000, 1)
            link.flush()
        assert (said, os.readlink(f"/proc/self/fd/{descriptors[0]}")) == (b"keep", "/memfd:the mount (deleted)")
        os.close(descriptors[0])


async def test_the_end_of_the_holder_is_heard() -> None:
    with linked("") as (link, holder):
        holder.send(b"mount")
        link.turn()
        holder.send(b"hand")
        assert await link.heard() == "hand"
        holder.close()
        assert await link.heard() == ""
        link.set("a", "b")  # to nobody


def test_the_last_message_tells_whether_there_is_still_a_holder() -> None:
    with linked() as (link, holder):
        assert link.finish("handed")
        holder.close()
        assert not link.finish("handed")
        assert not link.finish("handed")
    assert not HolderLink().finish("handed")


def test_a_holder_that_was_killed_first_is_told_from_one_of_another_version() -> None:
    with linked() as (link, holder):
        holder.close()
        with pytest.raises(HolderGone, match="was killed before this server had its turn"):
            link.turn()


async def test_a_server_that_is_continued_by_its_user_is_no_orphan(monkeypatch: pytest.MonkeyPatch) -> None:
    """And of an orphan whose event loop turns, nothing remains but the order to end."""
    done: list[str] = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda seconds, **_: done.append(f"in {seconds:g} s"))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: done.append("turned"))
    before = signal.getsignal(signal.SIGCONT)
    try:
        with linked() as (link, _):
            HolderLink().end_if_orphaned()
            link.end_if_orphaned()
            signal.raise_signal(signal.SIGCONT)
            assert done == []
            monkeypatch.setattr(os, "getppid", lambda: 1)
            signal.raise_signal(signal.SIGCONT)
            while len(done) < 2:
                await trio.lowlevel.checkpoint()
            assert done == ["in 60 s", "turned"]
    finally:
        signal.signal(signal.SIGCONT, before)


def test_what_a_stopped_holder_has_not_read_stands_in_the_memory_that_it_has() -> None:
    with linked("") as (link, holder):
        holder.send(b"mount")
        link.turn()
        count = 0
        while not unsent(link):
            link.set("opens/5", str(count))
            count += 1
        assert unsent(link) == [f"set opens/5 {count - 1}".encode()]
        link.set("opens/5", "last")
        link.drop("opens/5")
        assert unsent(link)[1:] == [b"set opens/5 last", b"del opens/5"]
        heard(holder, 3)
        link.flush()
        while link._unsent:  # what it has read meanwhile is no longer needed there, once all has been sent
            assert unsent(link)
            heard(holder, 1)
            link.flush()
        assert unsent(link) == []
