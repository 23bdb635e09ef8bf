"""Hostile answers met through a real mount: what a reader gets, and what stays in the overlay.

Every row is an image of one mount. While its server misbehaves a reader gets right bytes or EIO; when the server
behaves it reads right; at the end the overlay is streamed whole and QEMU compares it with the content. A wrong byte
that had been kept would be in that comparison: nothing overwrites a cluster that is there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import random
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qedfs.control.qmp.client import Client
from qedfs.overlay.create import create_overlay
from tests.faults.farm import Farm, Row
from tests.harness.images import qemu_check, qemu_same
from tests.harness.mounts import Mount, mounted
from tests.harness.process import wait_for
from tests.mount.support import read_direct

IMAGE_SIZE = 1 << 20  # the scripted NBD exports have it
CLUSTER_SIZE = 1 << 16
SECTOR = 512
CURE_ATTEMPTS = 5

RIGHT, FAILED, CHANGED, FORBIDDEN = "right bytes", "EIO", "EIO, source changed", "EACCES"

# (position, size): a whole cluster, a part of one, a cluster of zeros, the last sectors, a cluster that is there.
READS = ((3 << 16, 1 << 16), ((5 << 16) + 8192, 4096), (7 << 16, 1 << 16), (IMAGE_SIZE - 4096, 4096), (0, 4096))


@dataclasses.dataclass
class Outcome:
    """What one row came to."""

    row: Row
    hostile: str = ""  # while the server misbehaved
    reason: str = ""  # what the status said then
    cured: str = ""  # once it behaved
    end: str = ""  # of the stream
    wrong: list[str] = dataclasses.field(default_factory=list)  # every promise that was broken


def content() -> bytes:
    """Sectors that name their own position, but for some clusters of zeros: a byte from elsewhere is always seen."""
    filler = random.Random(0).randbytes(SECTOR - 8)
    data = bytearray(b"".join(pos.to_bytes(8, "big") + filler for pos in range(0, IMAGE_SIZE, SECTOR)))
    for cluster in (7, 12):
        data[cluster * CLUSTER_SIZE : (cluster + 1) * CLUSTER_SIZE] = bytes(CLUSTER_SIZE)
    return bytes(data)


def run(folder: Path, rows: Sequence[Row], *, timeout: str = "2s") -> list[Outcome]:
    """These rows through mounts in `folder`. `timeout` is that of the mount for its sources."""
    data = content()
    outcomes = [Outcome(row) for row in rows]
    overlays = folder / "overlays"
    overlays.mkdir()
    (folder / "content.raw").write_bytes(data)
    with Farm(rows, data) as farm:
        trial = _Trial(overlays, folder / "mnt", outcomes, farm, data)
        trial.prepare()
        with mounted(overlays, trial.mountpoint, "--no-stream", "--source-timeout", timeout) as mount:
            trial.misbehave(mount)
            trial.behave()
            _end(mount)
        with mounted(overlays, trial.mountpoint, "--source-timeout", timeout) as mount:
            trial.stream(mount)
            _end(mount)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(trial.compare, outcomes))
    return outcomes


def _end(mount: Mount) -> None:
    if mount.unmount() != 0 or "internal error" in mount.output():
        raise AssertionError(f"the mount did not go through it unharmed:\n{mount.output()}")


@dataclasses.dataclass
class _Trial:
    overlays: Path
    mountpoint: Path
    outcomes: list[Outcome]
    farm: Farm
    data: bytes

    def prepare(self) -> None:
        for row, fake in self.farm.fakes.items():
            create_overlay(str(self._overlay(row)), image_size=IMAGE_SIZE, backing=fake.url)
            if row.when == "first":
                fake.misbehave()

    def misbehave(self, mount: Mount) -> None:
        """Read while the servers do what their rows say, with streams that ask for extents beside the readers."""
        with ThreadPoolExecutor(len(self.outcomes)) as pool:
            list(pool.map(self._read_first_cluster, self.outcomes))
            for outcome in self.outcomes:
                if outcome.row.when == "later":
                    self.farm.fakes[outcome.row].misbehave()
            with Client.connect(str(mount.mountpoint)) as client:
                for outcome in self.outcomes:
                    if "extent" in outcome.row.behaviour:
                        client.execute("x-qedfs-start", device=outcome.row.name)
        results = self._read_all()
        for (outcome, image), result in zip(self._with_status(mount), results, strict=True):
            outcome.reason = image["error"] or ""
            changed = re.search("is now|another version", outcome.reason)
            outcome.hostile = CHANGED if result == FAILED and changed else result

    def _read_first_cluster(self, outcome: Outcome) -> None:
        if outcome.row.when == "later" and self._read(outcome, (0, CLUSTER_SIZE)) != RIGHT:
            outcome.wrong.append("could not be read before anything was wrong")

    def behave(self) -> None:
        for fake in self.farm.fakes.values():
            fake.behave()
        # Some seconds more than one deadline: on a loaded machine a right answer may take as long.
        for _ in range(CURE_ATTEMPTS):
            self._read_cured()
            if not any(self._is_ill(outcome) for outcome in self.outcomes):
                return
        for outcome in self.outcomes:
            if self._is_ill(outcome):
                outcome.wrong.append("does not read though the server behaves")

    def _read_cured(self) -> None:
        for outcome, result in zip(self.outcomes, self._read_all(), strict=True):
            # Whoever has been told that the source is another version does not believe it again before a remount.
            outcome.cured = CHANGED if (outcome.hostile, result) == (CHANGED, FAILED) else result

    def _is_ill(self, outcome: Outcome) -> bool:
        return outcome.row.can_be_cured and outcome.cured not in (RIGHT, CHANGED)

    def stream(self, mount: Mount) -> None:
        """Let the streams come to their end, good or bad."""
        with contextlib.suppress(TimeoutError):  # the outcomes tell which has not ended
            wait_for(lambda: self._have_ended(mount), "the end of the streams")
        for outcome, image in self._with_status(mount):
            outcome.end = image["state"]
            if outcome.row.can_be_cured and outcome.end != "complete":
                outcome.wrong.append(f"did not complete: {image['error']}")
            if not outcome.row.can_be_cured and image["populated"]:
                outcome.wrong.append("has kept something")

    def _have_ended(self, mount: Mount) -> bool:
        states = {image["state"] for outcome, image in self._with_status(mount) if outcome.row.can_be_cured}
        return states <= {"complete", "failed", "source-changed"}

    def compare(self, outcome: Outcome) -> None:
        if outcome.end != "complete":
            return
        overlay = self._overlay(outcome.row)
        if qemu_check(overlay) != (0, 0):
            outcome.wrong.append("qemu-img check finds faults")
        if not qemu_same(overlay, self.overlays.parent / "content.raw"):
            outcome.wrong.append("the overlay holds wrong bytes")

    def _overlay(self, row: Row) -> Path:
        return self.overlays / f"{row.name}.qed"

    def _with_status(self, mount: Mount) -> list[tuple[Outcome, dict[str, Any]]]:
        images = {image["name"]: image for image in mount.status()["images"]}
        return [(outcome, images[f"{outcome.row.name}.raw"]) for outcome in self.outcomes]

    def _read_all(self) -> list[str]:
        """Every part of every image at once, so that all wait for one deadline; the worst result of each image."""
        jobs = [(outcome, part) for outcome in self.outcomes for part in READS]
        with ThreadPoolExecutor(len(jobs)) as pool:
            results = list(pool.map(lambda job: self._read(*job), jobs))
        local = len(READS) - 1
        for outcome, result in zip(self.outcomes, results[local :: len(READS)], strict=True):
            if outcome.row.when == "later" and result != RIGHT:
                outcome.wrong.append("does not read what it has")
        per_image = [results[at : at + local] for at in range(0, len(jobs), len(READS))]
        return [next((bad for bad in (FORBIDDEN, FAILED) if bad in found), RIGHT) for found in per_image]

    def _read(self, outcome: Outcome, part: tuple[int, int]) -> str:
        pos, size = part
        try:
            found = read_direct(self.mountpoint / f"{outcome.row.name}.raw", pos, size)
        except OSError as exc:
            if exc.errno == errno.EACCES:
                return FORBIDDEN
            if exc.errno != errno.EIO:
                outcome.wrong.append(f"{exc.strerror} instead of EIO")
            return FAILED
        if found != self.data[pos : pos + size]:
            outcome.wrong.append(f"wrong bytes at {pos}")
        return RIGHT
