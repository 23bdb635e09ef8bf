"""Every command block of README and the guide runs as it stands there, on a real mount over real servers.

What a reader has elsewhere is put in its place: the servers' names become those of a local nginx and qemu-nbd, and a
virtual machine is a program that reads and writes its disk and ends. (`tests/mount/test_guest.py` and `contrib/bench`
boot a guest.) Of twenty machines there are three.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.harness.hang import HANG_SECONDS
from tests.harness.process import free_port
from tests.harness.require import require, require_fuse, require_root
from tests.harness.servers import nginx
from tests.harness.starter import program

from .blocks import ROOT, Block, blocks, documents, recipes

MIB = 1 << 20
SIZE = 10 * MIB  # of the disk
PARTITION = 1 * MIB  # the place of a first partition: sector 2048
# A guest: it reads the disk that it was given, writes to it, and ends.
MACHINE = """#!/bin/sh
for word; do case $word in file=*) disk=${word#file=}; disk=${disk%%,*};; esac; done
set -e
dd if="$disk" of=/dev/null bs=64k count=64 status=none
dd if=/dev/zero of="$disk" bs=4k seek=2 count=1 conv=notrunc status=none
"""
# A container: a program in a mount namespace of its own, with a folder of the host at another place.
CONTAINER = """#!/bin/sh
set -e
while [ "$1" != debian:trixie ]; do
    case $1 in --volume) volume=$2; shift ;; esac
    shift
done
shift
exec unshare --mount --propagation slave sh -ec '
    mount -t tmpfs none /mnt
    mkdir /mnt/disks
    mount --bind "$1" /mnt/disks
    shift
    exec "$@"' sh "${volume%%:*}" $(printf "%s " "$@" | sed "s#/disks#/mnt/disks#")
"""
PROGRAMS = {
    "docker": CONTAINER,
    "qemu-system-x86_64": MACHINE,
    "sudo": '#!/bin/sh\nexec "$@"\n',
}


class Origin(NamedTuple):
    """Where the images come from."""

    url: str
    disk: Path


CASES = [(path, name) for path in documents() for name in recipes(path)]


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Origin]:
    """A server that has one disk, under all names and in all formats that the documents use."""
    folder = tmp_path_factory.mktemp("origin")
    files = tmp_path_factory.mktemp("files")
    (files / "etc").mkdir()
    (files / "etc/hostname").write_text("far-away\n")
    raw = folder / "debian.raw"
    with raw.open("wb") as disk:
        disk.truncate(SIZE)
        disk.seek(446)  # an MBR with one partition, of the type Linux
        disk.write(struct.pack("<4xB3xII", 0x83, PARTITION // 512, (SIZE - PARTITION) // 512))
        disk.seek(510)
        disk.write(b"\x55\xaa")
    size = f"{(SIZE - PARTITION) >> 10}k"
    options: list[str | Path] = ["-q", "-F", "-d", files, "-E", f"offset={PARTITION}", raw, size]
    subprocess.run([require("mkfs.ext4"), *options], check=True)
    for name in ("base.raw", "mirror.raw"):
        (folder / name).symlink_to(raw)
    packed = folder / "debian.qcow2"
    subprocess.run([require("qemu-img"), "convert", "-c", "-O", "qcow2", raw, packed], check=True)
    (folder / "debian-13-nocloud-amd64.qcow2").symlink_to(packed)
    with nginx(folder) as server:
        yield Origin(f"{server.url}/", raw)


@pytest.mark.parametrize(("document", "name"), CASES, ids=[f"{path.stem}-{name}" for path, name in CASES])
def test_a_recipe_works_as_it_stands(document: Path, name: str, origin: Origin, tmp_path: Path) -> None:
    steps = recipes(document)[name]
    require_fuse()
    if any(step.root for step in steps):
        require_root()
    with _workplace(tmp_path) as environ:
        (tmp_path / "disk.raw").symlink_to(origin.disk)  # a disk of the old host
        ports = {"10809": free_port(), "9188": free_port()}
        for step in steps:
            script = _localised(step.commands, origin.url, ports)
            done = subprocess.run(
                [require("bash"), "-euo", "pipefail", "-c", script],
                cwd=tmp_path,
                env=environ,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
                timeout=HANG_SECONDS,
                pass_fds=[program()[1]],
            )
            assert done.returncode == 0, f"{step.document}:{step.line}:\n{script}\n{done.stdout}{done.stderr}"


def _localised(commands: str, origin: str, ports: dict[str, int]) -> str:
    """The same commands with local servers, at free ports, and fewer of what is all alike."""
    commands = commands.replace("$(seq 20)", "$(seq 3)")
    commands = re.sub(r"https?://server/", origin, commands)
    commands = re.sub(r"https://cloud\.debian\.org/\S*/", origin, commands)
    commands = commands.replace("nbd://oldhost/", f"nbd://127.0.0.1:{ports['10809']}/")
    commands = commands.replace("9188", str(ports["9188"]))
    return re.sub(r"^qemu-nbd ", f"qemu-nbd --port {ports['10809']} ", commands, flags=re.MULTILINE)


@contextlib.contextmanager
def _workplace(folder: Path) -> Iterator[dict[str, str]]:
    """The environment of the commands. At the end their mounts are gone and what they left running has ended."""
    programs = folder / ".bin"
    programs.mkdir()
    for name, text in {**PROGRAMS, "qedfs": program()[0]}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    path = f"{programs}:{os.environ['PATH']}:/usr/sbin:/sbin"
    try:
        yield {**os.environ, "PATH": path, "HOME": str(folder), "PYTHONPATH": str(ROOT)}
    finally:
        _unmount(folder)
        _end_programs(folder)


def _unmount(folder: Path) -> None:
    """All mounts below the folder, the innermost first; a file system inside an image may be mounted elsewhere."""
    for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
        device, place = line.split()[:2]
        if place.startswith(f"{folder}/") or device.startswith(f"{folder}/"):
            subprocess.run([require("umount"), "--lazy", place], check=False)


def _end_programs(folder: Path) -> None:
    """Servers that a block has put into the background. They may be in another folder, but have the block's HOME."""
    home = f"HOME={folder}".encode()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and home in (entry / "environ").read_bytes().split(b"\0"):
                os.kill(int(entry.name), signal.SIGTERM)


@pytest.mark.parametrize("document", documents(), ids=lambda path: path.stem)
def test_something_runs_every_block(document: Path) -> None:
    """What runs elsewhere has at least the program of its first command there."""
    for block in blocks(document):
        if block.elsewhere:
            assert _runs_there(block), f"{document.name}:{block.line}: {block.elsewhere} does not have these commands"


def _runs_there(block: Block) -> bool:
    there = (ROOT / block.elsewhere).read_text()
    words = [word for word in block.commands.split() if word != "sudo"]
    return words[0] in there or "commands_tried_by" in there  # which runs the block itself
