"""An HTTP source in a process that has no descriptor left: that passes, so it is worth another try."""

from __future__ import annotations

import errno
import os
import select
import socket
from types import SimpleNamespace
from typing import NoReturn

import pytest
import trio

from qedfs.errors import Reason, SourceUnreachable
from qedfs.source.http import HttpSource, exchange, multi
from qedfs.source.policy import Policy
from qedfs.source.url import parse_location
from tests.fakes.http_server import FakeHttpServer
from tests.source.http.conftest import CONTENT, OpenSource, read


def none_left(*_: object) -> NoReturn:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


async def test_no_socket(server: FakeHttpServer, open_source: OpenSource, monkeypatch: pytest.MonkeyPatch) -> None:
    source = await open_source(server.url())
    with monkeypatch.context() as patch:
        patch.setattr(exchange, "socket", SimpleNamespace(socket=none_left))
        for _ in range(3):
            with pytest.raises(SourceUnreachable, match="too many open files") as caught:
                await read(source, 5, 10)
            assert caught.value.reason is Reason.OTHER
            assert isinstance(caught.value.__cause__, OSError)
    assert vars(exchange)["socket"] is socket
    assert await read(source, 5, 10) == CONTENT[5:15]


@pytest.mark.parametrize("left", [0, 1])
async def test_nothing_to_wait_with(
    server: FakeHttpServer, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    """Whichever of the two pools cannot be made, nothing of the other one stays."""
    made: list[select.epoll] = []

    def epoll() -> select.epoll:
        if len(made) == left:
            none_left()
        made.append(select.epoll())
        return made[-1]

    monkeypatch.setattr(multi, "select", SimpleNamespace(**{**vars(select), "epoll": epoll}))
    tasks = len(nursery.child_tasks)
    with pytest.raises(SourceUnreachable, match=r"disk\.raw: too many open files"):
        await HttpSource.open(parse_location(server.url()), Policy(), nursery)
    await trio.testing.wait_all_tasks_blocked()
    assert len(nursery.child_tasks) == tasks
    assert all(each.closed for each in made)
