"""`qedfs snapshot`: what it refuses, and what it prints. What it does is in tests/mount/test_snapshot.py."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from qedfs.cli.commands import snapshot as module
from tests.harness.mounts import qedfs


def test_nothing_is_mounted_there(tmp_path: Path) -> None:
    done = qedfs("snapshot", tmp_path, "disk", tmp_path / "snap", check=False)
    assert (done.returncode, done.stderr.count("\n")) == (10, 1)


class Server:
    """A server with one image."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def execute(self, name: str, **arguments: Any) -> Any:
        if name == "x-qedfs-status":
            return {"images": [{"name": "disk.raw", "served": True}], "released": []}
        self.asked.append({"execute": name, **arguments})
        return {"file": arguments["file"], "pause_seconds": 0.0123}


@pytest.mark.parametrize(("options", "said"), [([], "writes waited for 12 ms"), (["--quiet"], "")])
def test_the_server_gets_the_whole_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], said: str
) -> None:
    server = Server()

    @contextlib.contextmanager
    def connect(_: str) -> Iterator[Server]:
        yield server

    monkeypatch.setattr(module, "lasting_client", connect)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(module.snapshot, ["mnt", "disk.qed", "snap", *options])
    assert said in done.output
    assert bool(done.output) == bool(said)
    assert server.asked == [{"execute": "x-qedfs-snapshot", "device": "disk", "file": str(tmp_path / "snap")}]
