"""`mount -t qedfs` and lines of fstab, through contrib/mount.qedfs in the place where mount(8) looks for it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.alone import alone_with
from tests.harness.hang import HANG_SECONDS
from tests.harness.mounts import Mount, is_mounted, qedfs
from tests.harness.require import require, require_fuse, require_root, unavailable
from tests.mount.support import MIB, Origin, assert_same, create, origin

from .machine import CONTRIB, Installed

HELPER = CONTRIB / "mount.qedfs"
PLACE = Path("/sbin/mount.qedfs")
FSTAB_OPTIONS = "rw,defaults,noauto,nofail,user,noexec,_netdev,x-systemd.automount,x-systemd.requires=network.target"


class Host:
    """An overlay and a folder to mount it on, where the helper is installed."""

    def __init__(self, folder: Path, source: Origin) -> None:
        self.folder = folder
        self.source = source
        self.overlay = create(folder / "disk.qed", source.url)
        self.mountpoint = folder / "mnt"
        self.mountpoint.mkdir()

    def run(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """Runs a program."""
        return subprocess.run(words, capture_output=True, text=True, timeout=HANG_SECONDS, check=False)

    def image(self) -> dict[str, object]:
        """The image's entry in the status."""
        return _Mounted(self.mountpoint).image()


class _Mounted(Mount):
    """A mount that is asked over its control socket only."""

    def __init__(self, mountpoint: Path) -> None:
        self.mountpoint = mountpoint


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    require_root()
    require_fuse()
    installed = Installed(tmp_path / "machine")
    with alone_with(PLACE.name), origin(tmp_path, 4 * MIB) as source:
        if PLACE.exists() or PLACE.is_symlink():
            unavailable(f"{PLACE} is there already; it is left alone")
        PLACE.symlink_to(_checkout(tmp_path / "checkout", installed) / "contrib" / "mount.qedfs")
        try:
            yield Host(tmp_path, source)
        finally:
            PLACE.unlink()
            left: list[str | Path] = [require("umount"), "--lazy", tmp_path / "mnt"]
            subprocess.run(left, check=False, capture_output=True, timeout=HANG_SECONDS)


def _checkout(folder: Path, installed: Installed) -> Path:
    """What the helper needs of a checkout, with this interpreter's qedfs in its .venv."""
    (folder / "contrib").mkdir(parents=True)
    (folder / ".venv").mkdir()
    shutil.copy(HELPER, folder / "contrib")
    (folder / ".venv" / "bin").symlink_to(installed.folder / "bin")
    return folder


def test_mount_and_umount_by_the_systems_own_commands(host: Host) -> None:
    done = host.run(require("mount"), "-t", "qedfs", "-o", "limit=64M,stream=off", host.overlay, host.mountpoint)
    assert (done.returncode, done.stderr) == (0, "")
    assert is_mounted(host.mountpoint)
    assert_same(host.mountpoint / "disk.raw", host.source.raw)
    assert (host.image()["limit"], host.image()["state"]) == (64 * MIB, "off")
    assert host.run(require("umount"), host.mountpoint).returncode == 0
    assert not is_mounted(host.mountpoint)


def test_a_line_of_fstab(host: Host) -> None:
    fstab = host.folder / "fstab"
    options = f"{FSTAB_OPTIONS},no_stream,source_timeout=10s"
    fstab.write_text(f"# comment\n{host.overlay} {host.mountpoint} qedfs {options} 0 0\n")
    done = host.run(require("mount"), "-T", fstab, host.mountpoint)
    assert (done.returncode, done.stderr) == (0, "")
    assert host.image()["state"] == "off"
    assert host.run(require("umount"), host.mountpoint).returncode == 0


@pytest.mark.parametrize("words", [("-o", "ro,limit=1M"), ("-r",)])
def test_read_only(host: Host, words: tuple[str, ...]) -> None:
    done = host.run(require("mount"), "-t", "qedfs", *words, host.overlay, host.mountpoint)
    assert (done.returncode, done.stderr) == (0, "")
    assert (host.image()["read_only"], host.image()["state"]) == (True, "off")
    assert_same(host.mountpoint / "disk.raw", host.source.raw)
    assert host.run(require("umount"), host.mountpoint).returncode == 0


def test_a_failure_has_mounts_exit_code_and_our_words(host: Host) -> None:
    done = host.run(require("mount"), "-t", "qedfs", host.folder / "none.qed", host.mountpoint)
    assert done.returncode == 32
    assert "none.qed" in done.stderr
    done = host.run(require("mount"), "-t", "qedfs", "-o", "limt=5", host.overlay, host.mountpoint)
    assert done.returncode == 32
    assert "--limt" in done.stderr
    assert not is_mounted(host.mountpoint)


def test_what_mount_a_does_the_second_time(host: Host) -> None:
    fstab = host.folder / "fstab"
    fstab.write_text(f"{host.overlay} {host.mountpoint} qedfs _netdev,nofail,no_stream 0 0\n")
    for _ in range(2):
        done = host.run(require("mount"), "-T", fstab, "--all")
        assert (done.returncode, done.stderr) == (0, "")
    assert host.run(require("umount"), host.mountpoint).returncode == 0
    assert not is_mounted(host.mountpoint)


def test_a_remount_is_refused_in_words(host: Host) -> None:
    done = host.run(PLACE, host.overlay, host.mountpoint, "-o", "rw,remount,limit=1M")
    assert done.returncode == 32
    assert "cannot be changed; unmount it and mount it again" in done.stderr


def test_without_qedfs_it_says_where_it_looked(tmp_path: Path) -> None:
    (tmp_path / "contrib").mkdir()
    helper = shutil.copy(HELPER, tmp_path / "contrib")
    if any(Path(place, "qedfs").exists() for place in ("/usr/local/bin", "/usr/bin", "/bin")):
        unavailable("qedfs is installed on this machine")
    done = subprocess.run([helper, "a", "b"], capture_output=True, text=True, timeout=HANG_SECONDS, check=False)
    assert done.returncode == 32
    assert f"no qedfs in /usr/local/bin:/usr/bin:/bin:{tmp_path}" in done.stderr


def test_a_dry_run_does_nothing(host: Host) -> None:
    assert host.run(PLACE, host.overlay, host.mountpoint, "-f", "-o", "rw").returncode == 0
    assert not is_mounted(host.mountpoint)


@pytest.mark.parametrize("words", [[], ["one"], ["a", "b", "c"], ["a", "b", "-x"], ["a", "b", "-N", "/proc/1/ns/mnt"]])
def test_wrong_usage(words: list[str]) -> None:
    done = subprocess.run([HELPER, *words], capture_output=True, text=True, timeout=HANG_SECONDS, check=False)
    assert done.returncode == 1
    assert "mount.qedfs" in done.stderr


def test_all_letters_of_mount(host: Host) -> None:
    words = ("-s", "-n", "-v", "-t", "qedfs", "-o", "rw,no_stream", "-o", "limit=1M")
    done = host.run(PLACE, host.overlay, host.mountpoint, *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert host.image()["limit"] == MIB
    qedfs("umount", host.mountpoint)
