"""A guest from power on to the last marker on its console, its disk 20 or 200 ms away.

The guest (tests/harness/guest.py) loads its modules, mounts its ext4, verifies the files in it, writes, unmounts. Its
processor is emulated, so it spends more time on its own than a real one would.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.harness.guest import guest_disk
from tests.harness.mounts import qedfs

from .. import bounded, ours, peers, qemu
from ..figures import GIB, MIB
from ..lab import Lab, Origin
from ..values import QEDFS, QEMU, Contenders, Outcome, Row, Target, Unit

_RTT_MS, _FAR_RTT_MS = 20, 200
_BOOT_SECONDS = 200.0
_GRACE_SECONDS = 20.0
# In a process that may be left behind: an emulator that waits for a dead mount cannot be killed.
_BOOT = """
import sys, time
from tests.harness.guest import boot
began = time.monotonic()
boot(sys.argv[1], timeout_seconds=float(sys.argv[2]))
print(time.monotonic() - began)
"""
_LOCAL = "local raw file"
_DOWNLOAD = "download first"
_UNPROFILED = "no profile"


def _boot(drive: str) -> float:
    argv = [sys.executable, "-c", _BOOT, f"{drive},cache=none", str(_BOOT_SECONDS)]
    return float(bounded.run(argv, _BOOT_SECONDS + _GRACE_SECONDS))


def _ours(lab: Lab, origin: Origin, *options: str) -> Outcome:
    with ours.cold(lab, origin, *options, stream=True) as (mount, image):
        seconds = _boot(f"file={image},format=raw")
        return Outcome(seconds, {"local at the end": mount.image()["populated"] / origin.size})


def _qemu(lab: Lab, origin: Origin) -> Outcome:
    with qemu.cold_overlay(lab, origin) as overlay:
        return Outcome(_boot(f"file={overlay},format=qed,copy-on-read=on"))


def _local(lab: Lab, disk: Path) -> Outcome:
    copy = lab.fresh("local.raw")
    try:
        shutil.copyfile(disk, copy)
        lab.settle()
        return Outcome(_boot(f"file={copy},format=raw"))
    finally:
        copy.unlink(missing_ok=True)


def _download(lab: Lab, origin: Origin) -> Outcome:
    copy = lab.fresh("download.raw")
    try:
        began = time.monotonic()
        peers.copy(origin, copy)
        seconds = time.monotonic() - began
        return Outcome(seconds + _boot(f"file={copy},format=raw"), {"download s": seconds})
    finally:
        copy.unlink(missing_ok=True)


def _profile(lab: Lab, origin: Origin) -> Path:
    """What a boot without a stream waits for."""
    with ours.cold(lab, origin) as (mount, image):
        _boot(f"file={image},format=raw")
        profile = lab.fresh("boot.profile")
        qedfs("profile", mount.mountpoint, image.stem, profile)
    return profile


@contextlib.contextmanager
def _prepare(lab: Lab) -> Iterator[Contenders]:
    disk = _disk(lab)
    with lab.origin("http", GIB, _RTT_MS, image=disk) as origin:
        yield {
            QEDFS: partial(_ours, lab, origin),
            QEMU: partial(_qemu, lab, origin),
            _LOCAL: partial(_local, lab, disk),
            _DOWNLOAD: partial(_download, lab, origin),
        }


@contextlib.contextmanager
def _prepare_far(lab: Lab) -> Iterator[Contenders]:
    disk = _disk(lab)
    with lab.origin("http", GIB, _FAR_RTT_MS, image=disk) as origin:
        profile = _profile(lab, origin)
        yield {
            QEDFS: partial(_ours, lab, origin, f"--profile={profile}"),
            _UNPROFILED: partial(_ours, lab, origin),
            QEMU: partial(_qemu, lab, origin),
            _LOCAL: partial(_local, lab, disk),
            _DOWNLOAD: partial(_download, lab, origin),
        }


def _disk(lab: Lab) -> Path:
    files = lab.fresh("guest")
    files.mkdir()
    for number, size in enumerate((16 * MIB, 8 * MIB, MIB, MIB, 64 << 10, 4 << 10)):
        with lab.base(64 * MIB).open("rb") as source:
            (files / f"file{number}").write_bytes(source.read(size))
    folder = lab.fresh("disk")
    folder.mkdir()
    return guest_disk(folder / "guest.raw", GIB, files)


ROWS = (
    Row(
        "boot",
        f"a guest to its last marker, disk of 1 GiB {_RTT_MS} ms away, HTTP",
        Unit.SECONDS,
        _prepare,
        (Target(1.25, _LOCAL), Target(1.0, _DOWNLOAD)),
    ),
    Row(
        "boot-200ms",
        f"the same, {_FAR_RTT_MS} ms away, with the profile of an earlier boot",
        Unit.SECONDS,
        _prepare_far,
        (Target(1.0, _UNPROFILED), Target(1.0, _DOWNLOAD)),
    ),
)
