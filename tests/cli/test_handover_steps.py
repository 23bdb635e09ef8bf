"""A migration with its disk between two QEMUs and a mount that are fakes: who has the guest when a step fails.

`tests/cli/test_handover.py` and `tests/cli/test_migrate.py` show the same with real ones.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from qedfs.cli.commands import migrate as command
from qedfs.cli.migration import disk_export, handover, moved_image
from qedfs.cli.migration.handover import Handover
from qedfs.cli.migration.moved_disk import disk_meant, has_disk_on
from qedfs.cli.migration.moved_image import MovedImage
from qedfs.cli.migration.two_qemus import Lost, TwoQemus
from qedfs.control.qmp.client import Client, Gone
from qedfs.errors import InUse, QedfsError, SourceError, SourceUnreachable, TimedOut, UsageError
from tests.fakes.qemu import FakePair, FakeQemu

SIZE = 1 << 20


class FakeMount(Client):
    """The server of a mount with one image, as `qedfs migrate` uses it."""

    def __init__(self) -> None:
        self.deadline = math.inf
        self.image: dict[str, Any] = {
            "name": "disk.raw",
            "served": True,
            "size": SIZE,
            "state": "standby",
            "backing": "nbd://old/disk",
            "error": None,
            "reason": None,
            "exit_code": 0,
            "condition": [],
            "overlay": "/overlays/disk.qed",
            "populated": 0,
            "total": SIZE,
            "rate": 0,
            "eta_seconds": None,
        }
        self.images = [self.image]
        self.ready: QedfsError | None = None  # why a cut-over would fail
        self.failure: QedfsError | None = None  # why it does
        self.refusal: QedfsError | None = None  # why there is no way back
        self.away = 0  # commands that find no server, from now on
        self.closed = 0

    def execute(self, name: str, /, **arguments: Any) -> Any:
        if self.away:
            self.away -= 1
            raise Gone("the mount has ended")
        if name == "x-qedfs-status":
            return {"images": self.images}
        if name == "x-qedfs-ready":
            if self.ready is not None:
                raise self.ready
        elif arguments["active"]:
            if self.failure is not None:
                raise self.failure
            self.image["state"] = "running"
        elif self.refusal is not None:
            raise self.refusal
        else:
            self.image["state"] = "standby"
        return None

    def event(self, timeout_seconds: float) -> dict[str, Any] | None:
        self.image["state"] = "complete"
        return None

    def close(self) -> None:
        self.closed += 1


class FakeExport:
    """The server of the source's disk."""

    pid = 4711

    def __init__(self, done: list[str]) -> None:
        self._done = done

    def guard(self) -> None:
        self._done.append("guard")

    def end(self) -> None:
        self._done.append("end")

    def leave(self) -> None:
        self._done.append("leave")


def block(file: str, *, driver: str = "raw", ro: bool = False, size: int = SIZE, name: str = "disk") -> dict[str, Any]:
    """What query-block tells of a disk."""
    image = {"filename": file, "virtual-size": size}
    inserted = {"ro": ro, "drv": driver, "image": image, "node-name": f"#{name}"}
    return {"device": name, "qdev": f"/machine/peripheral/{name}0/virtio-backend", "inserted": inserted}


class Scene:
    """Two QEMUs, a mount, and a migration that has looked at everything."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *, post_copy: bool = False) -> None:
        self.file = folder / "old.raw"
        self.file.touch()
        self.pair, self.mount = FakePair(), FakeMount()
        self.pair.source.blocks = [block(str(self.file)), {"device": "cdrom"}]
        self.pair.destination.blocks = [block("/mnt/disk.raw")]
        self.said: list[str] = []
        self.exports: list[str] = []  # what was done with the server of the disk
        self.served: list[tuple[str, str, tuple[str, ...], str]] = []  # how it was started

        def start(path: str, driver: str, listen: Sequence[str], export: str) -> FakeExport:
            self.served.append((path, driver, tuple(listen), export))
            return FakeExport(self.exports)

        monkeypatch.setattr(disk_export.DiskExport, "start", start)
        self.qemus = TwoQemus(self.pair.source, self.pair.destination, "unix:/run/incoming", post_copy=post_copy)
        self.image = MovedImage(lambda: self.mount, None)
        self.handover = Handover(self.image, disk_meant(self.pair.source, None), self.qemus, self.said.append)

    def move(self, again: Callable[[], None] = lambda: None) -> None:
        self.handover.check()
        self.handover.serve("disk", ["--port=10809"])
        self.handover.try_connection()
        self.handover.move(math.inf, lambda _: None, again)

    @property
    def runs(self) -> str:
        """Where the guest runs; "" if it stands still."""
        there = (("source", self.pair.source), ("destination", self.pair.destination))
        (*places,) = (name for name, qemu in there if qemu.lives and qemu.status == "running")
        return " and ".join(places)


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(tmp_path, monkeypatch)


@pytest.mark.parametrize("post_copy", [False, True])
def test_the_guest_moves_and_its_disk_follows(post_copy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(tmp_path, monkeypatch, post_copy=post_copy)
    scene.move()
    outcome = scene.handover.outcome
    assert (scene.runs, outcome.guest, scene.mount.image["state"]) == ("destination", "destination", "running")
    scene.handover.free_memory(lambda _: None)
    assert not scene.pair.source.lives
    assert scene.exports == ["guard"]
    scene.handover.wait_disk(lambda _: None)
    scene.handover.end_export()
    scene.handover.close()
    assert scene.exports == ["guard", "end"]
    assert [name for name, value in outcome.as_json().items() if value is None] == ["export_pid"]
    assert scene.served == [(str(scene.file), "raw", ("--port=10809",), "disk")]
    assert scene.said == []


def test_what_does_not_fit_together(scene: Scene) -> None:
    scene.pair.destination.blocks = [block("/mnt/another.raw")]
    with pytest.raises(UsageError, match=r"has no disk on the image disk.raw"):
        scene.handover.check()
    scene.image.size += 512
    with pytest.raises(UsageError, match=rf"has {SIZE + 512} bytes, but disk has {SIZE}"):
        scene.handover.check()
    scene.mount.ready = SourceUnreachable("nobody is there")
    with pytest.raises(SourceUnreachable):
        scene.handover.try_connection()


def test_a_cut_over_that_fails_leaves_the_guest_at_the_source(scene: Scene) -> None:
    scene.mount.failure = SourceUnreachable("connects, but does not deliver")
    with pytest.raises(SourceUnreachable):
        scene.move()
    assert (scene.runs, scene.handover.outcome.guest) == ("source", "source")
    scene.handover.close()
    assert scene.exports == ["end"]


def test_an_image_that_does_not_go_back_is_told(scene: Scene) -> None:
    scene.mount.failure, scene.mount.refusal = TimedOut("no answer"), QedfsError("is complete")
    with pytest.raises(TimedOut):
        scene.move()
    assert scene.runs == "source"
    assert scene.said == ["disk.raw: cannot go back to standby: is complete; see activate --undo"]
    scene.mount.refusal = None
    scene.mount.image["state"] = "complete"
    with pytest.raises(QedfsError, match=r"disk.raw: is complete"):
        _stay_complete(scene).way_back()


def _stay_complete(scene: Scene) -> MovedImage:
    def execute(name: str, /, **arguments: Any) -> Any:
        return {"images": scene.mount.images} if name == "x-qedfs-status" else None

    scene.mount.execute = execute  # type: ignore[method-assign]
    return scene.image


def test_a_disk_with_tables_is_served_anew_when_nobody_changes_them_any_more(scene: Scene) -> None:
    scene.pair.source.blocks = [block(str(scene.file), driver="qcow2")]
    scene.handover = Handover(scene.image, disk_meant(scene.pair.source, None), scene.qemus, scene.said.append)

    def again() -> None:
        assert (scene.runs, scene.mount.image["state"], scene.exports) == ("", "standby", ["end"])
        scene.handover.serve("disk", [])

    scene.move(again)
    assert scene.runs == "destination"
    assert [driver for _, driver, _, _ in scene.served] == ["qcow2", "qcow2"]


def test_memory_that_does_not_arrive_leaves_the_guest_at_the_source(scene: Scene) -> None:
    scene.pair.slow = True
    with pytest.raises(TimedOut):
        scene.handover.move(0, lambda _: None, lambda: None)
    assert scene.runs == "source"
    assert scene.mount.image["state"] == "standby"


def test_a_destination_that_dies_in_the_last_step(scene: Scene) -> None:
    scene.pair.in_last_step = scene.pair.destination.kill
    with pytest.raises(Lost):
        scene.move()
    assert (scene.runs, scene.handover.outcome.guest, scene.mount.image["state"]) == ("source", "source", "standby")
    assert scene.said == []


def test_a_migration_that_has_failed_while_nobody_knows_of_the_destination(scene: Scene) -> None:
    def lose() -> None:
        scene.pair._fail("broken pipe")
        scene.pair.destination.cut = True

    scene.pair.in_last_step = lose
    with pytest.raises(Lost):
        scene.move()
    assert scene.runs == "source"
    assert scene.said == ["it is not certain that the guest does not run at the destination, too: end its QEMU"]


def test_a_guest_that_the_destination_does_not_start_comes_back(scene: Scene) -> None:
    scene.pair.stays_paused = True
    with pytest.raises(Lost):
        scene.move()
    assert (scene.runs, scene.handover.outcome.guest, scene.mount.image["state"]) == ("source", "source", "standby")
    assert scene.said == ["the guest runs on at the source; nothing was written at the destination"]


def test_a_guest_that_may_have_written_there_comes_back_never(scene: Scene) -> None:
    scene.pair.stays_paused = True
    scene.mount.refusal = QedfsError("a guest has written to it")
    with pytest.raises(Lost):
        scene.move()
    assert (scene.runs, scene.handover.outcome.guest) == ("", "stopped")
    assert "since the image may have been written to: a guest has written to it" in scene.said[0]
    scene.handover.close()
    assert scene.exports == ["leave"]  # its disk is needed


def test_a_guest_that_may_still_come_up_there_does_not_run_at_the_source(scene: Scene) -> None:
    def cut() -> None:
        scene.pair.destination.cut = True

    scene.pair.in_last_step = cut
    with pytest.raises(Lost):
        scene.move()
    assert scene.pair.source.status == "postmigrate"
    assert scene.said == ["the guest may still come up at the destination, so it stands still at the source"]


def test_which_images_a_disk_can_become(scene: Scene) -> None:
    mount = scene.mount
    for change, error, text in (
        ({"state": "running"}, UsageError, "is not in standby, but running"),
        ({"backing": "http://old/disk"}, UsageError, "a running machine's disk is served over NBD"),
        ({"served": False, "error": "is damaged", "condition": [{}]}, QedfsError, "is damaged"),
    ):
        before = dict(mount.image)
        mount.image |= change
        with pytest.raises(error, match=text):
            MovedImage(lambda: mount, None)
        mount.image |= before
    mount.images = [mount.image, {**mount.image, "name": "other.raw"}]
    with pytest.raises(UsageError, match="has 2 images; say which one"):
        MovedImage(lambda: mount, None)
    assert str(MovedImage(lambda: mount, "other")) == "other.raw"
    assert mount.closed == 4


def test_a_mount_that_is_away_while_one_waits_is_waited_for(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moved_image, "POLL_SECONDS", 0.0)
    scene.mount.away = 3
    scene.image.wait_complete(lambda _: None, scene.said.append)
    (said,) = scene.said
    assert said == "the mount has ended; the disk is served on until it is mounted again, and complete"
    scene.mount.image |= {"state": "failed", "reason": "the source lies", "exit_code": 4, "condition": [{}]}
    with pytest.raises(SourceError, match=r"disk.raw: the source lies"):
        scene.image.wait_complete(lambda _: None, scene.said.append)


def test_which_disk_moves(scene: Scene, tmp_path: Path) -> None:
    qemu = scene.pair.source
    one = block(str(scene.file), name="one")
    assert disk_meant(qemu, None).names == ("disk", "disk0", "#disk")
    qemu.blocks = [one, block(str(scene.file), name="two"), block("/cd", ro=True, name="three")]
    assert str(disk_meant(qemu, "two")) == str(disk_meant(qemu, "two0")) == "two"
    with pytest.raises(UsageError, match=r"has not one writable disk: one, two; say with --disk"):
        disk_meant(qemu, None)
    with pytest.raises(UsageError, match="has no writable disk three; there is one, two"):
        disk_meant(qemu, "three")
    qemu.blocks = [block(f'json:{{"driver": "raw", "file": "{scene.file}"}}')]
    with pytest.raises(UsageError, match="say it with --file"):
        disk_meant(qemu, None)
    assert disk_meant(qemu, None, str(scene.file)).path == str(scene.file)
    assert has_disk_on(qemu, "old.raw")
    assert not has_disk_on(qemu, "ld.raw")
    with pytest.raises(UsageError, match="runs on the host whose QEMU has this disk"):
        disk_meant(qemu, None, str(tmp_path / "none"))


# The command


@pytest.fixture
def run(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[dict[str, Any], BaseException | None]]:
    """Runs `qedfs migrate --json`. Returns the object that it prints, and its error."""
    qemus: dict[str, FakeQemu] = {"old": scene.pair.source, "new": scene.pair.destination}

    class Monitors:
        at = staticmethod(lambda address, name=None: contextlib.nullcontext(qemus[address]))

    # Its handlers of signals would stay with the process of the tests.
    monkeypatch.setattr(command, "ENDS", ())
    monkeypatch.setattr(command, "QemuClient", Monitors)
    monkeypatch.setattr(command, "_mount_at", lambda place: scene.mount)

    def invoke(*options: str) -> tuple[dict[str, Any], BaseException | None]:
        words = ["old", "new", "/mnt", "--to", "unix:/run/incoming", "--json", *options]
        result = CliRunner().invoke(command.migrate, words)
        found = [line for line in result.stdout.splitlines() if line.startswith("{")]
        shown = result.stdout[result.stdout.index("{") :] if found else "{}"
        return json.loads(shown), result.exception

    return invoke


Run = Callable[..., tuple[dict[str, Any], BaseException | None]]


def test_the_command_moves_the_guest_and_waits_for_its_disk(scene: Scene, run: Run) -> None:
    told, error = run("--quiet")
    assert error is None
    assert (told["guest"], told["export_pid"], told["error"], told["exit_code"]) == ("destination", None, None, 0)
    assert scene.served == [(str(scene.file), "raw", ("--port=10809",), "disk")]
    assert scene.exports == ["guard", "end"]


def test_the_command_serves_nothing_or_does_not_wait(scene: Scene, run: Run) -> None:
    told, error = run("--quiet", "--no-export", "--no-wait")
    assert (told["guest"], error, scene.served, scene.exports) == ("destination", None, [], [])
    assert scene.mount.image["state"] == "running"


def test_a_failure_of_the_command_is_told_in_json_too(scene: Scene, run: Run) -> None:
    scene.mount.failure = SourceUnreachable("nobody is there")
    told, error = run("--quiet")
    assert isinstance(error, SourceUnreachable)
    assert (told["guest"], told["error"], told["exit_code"]) == ("source", "nobody is there", 4)
    assert scene.runs == "source"


def test_what_the_command_refuses(scene: Scene, run: Run) -> None:
    assert isinstance(run("--no-export", "--listen", "10809")[1], UsageError)
    scene.mount.image["backing"] = "nbds://old/disk"
    told, error = run("--quiet")
    assert "serve the disk with TLS yourself" in str(error)
    assert told["guest"] == "source"


def test_a_second_writer_is_not_guarded_against_in_vain(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source's QEMU stays then, with its memory: nobody has to guess what became of the disk."""

    def guard(_: FakeExport) -> None:
        raise InUse("another program has the image open for writing")

    monkeypatch.setattr(FakeExport, "guard", guard)
    scene.move()
    with pytest.raises(InUse):
        scene.handover.free_memory(lambda _: None)
    assert scene.pair.source.lives
    assert handover.ENDS
