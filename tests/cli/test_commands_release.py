"""`qedfs release`: what it refuses, and how its wait ends. What it does is in tests/mount/test_release.py."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from qedfs.cli.commands import release as module
from qedfs.errors import NotMounted, QedfsError, TimedOut, UsageError
from tests.harness.mounts import qedfs


@pytest.mark.parametrize("words", [["--undo", "--wait"], ["--timeout", "5s"], []])
def test_what_makes_no_sense_is_refused(tmp_path: Path, words: list[str]) -> None:
    done = qedfs("release", tmp_path, "disk", *words, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2 if words else 10, 1)


def image(**more: Any) -> dict[str, Any]:
    return {"name": "disk.raw", "served": True, "releasing": True, "opens": 1, "error": None, "reason": None, **more}


class Server:
    """A server whose statuses are these, one at a time; None: it does not answer."""

    def __init__(self, *statuses: dict[str, Any] | None) -> None:
        self.statuses = list(statuses)

    @contextlib.contextmanager
    def connect(self, *_: object, **__: object) -> Iterator[Server]:
        if self.statuses[0] is None:
            del self.statuses[0]
            raise NotMounted("no server")
        yield self

    def execute(self, name: str, **_: object) -> Any:
        if name == "x-qedfs-release":
            return {"released": False}
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        if status is None:
            raise NotMounted("it has ended")
        return {"images": [status], "released": []} if status else {"images": [], "released": ["disk.raw"]}


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Exception | None]:
    def run(server: Server, *words: str, mounted: str | None = "fuse.qedfs") -> Exception | None:
        monkeypatch.setattr(module, "connect", server.connect)
        monkeypatch.setattr(module, "mounted_type", lambda _: mounted)
        monkeypatch.setattr(module, "is_dead", lambda _: False)
        monkeypatch.setattr(module, "POLL_SECONDS", 0.0)
        done = CliRunner().invoke(module.release, ["mnt", "disk", "--wait", *words])
        assert done.exception is None or isinstance(done.exception, QedfsError), done.exc_info
        return done.exception

    return run


def test_a_wait_goes_on_at_the_next_server(wait: Callable[..., Exception | None]) -> None:
    server = Server(None, image(), image(), None, None, image(opens=0), {})
    assert wait(server) is None


def test_a_wait_ends_with_the_mount(wait: Callable[..., Exception | None]) -> None:
    assert isinstance(wait(Server(image(), image(), None), mounted=None), NotMounted)


def test_a_wait_ends_when_the_order_does(wait: Callable[..., Exception | None]) -> None:
    error = wait(Server(image(), image(releasing=False)))
    assert "the order was taken back" in str(error)
    full = image(releasing=False, error="no room", condition=[{"cause": "no-space"}], overlay="/disk.qed", state="off")
    assert str(wait(Server(image(), full))) == "disk.raw: is not released: no room"


def test_a_wait_ends_in_time(wait: Callable[..., Exception | None]) -> None:
    error = wait(Server(image()), "--timeout", "0s")
    assert isinstance(error, TimedOut)
    assert str(error) == "disk.raw: is not released yet: 1 have it open; the order stays"


def test_a_wait_says_what_it_is_for_whenever_that_changes(
    wait: Callable[..., Exception | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(module, "remark", said.append)
    job = {"type": "defrag", "state": "running"}
    changes = image(), image(), image(job=job, opens=0), image(job={**job, "state": "complete"}, opens=0)
    assert wait(Server(image(), *changes, {}), "--quiet") is None
    assert wait(Server(image(), *changes, {})) is None
    lines = ("1 have it open", "its defrag is running", "it is being closed")
    assert said == [f"disk.raw: is not released yet: {line}" for line in lines]


def test_an_image_that_is_not_there(wait: Callable[..., Exception | None]) -> None:
    assert isinstance(wait(Server(image(name="other.raw"))), UsageError)
