"""The guide's commands for a host's administrator, as they stand there, on a machine that a real systemd has booted.

Two things are put in place of what this machine may lack: a libvirt that calls its hook as libvirt does, and the users
that its package brings.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.documents.blocks import commands_tried_by, documents, files
from tests.mount.support import MIB, create, origin

from .machine import ROOT, Machine, machine

# https://libvirt.org/hooks.html: before a guest starts. An exit code other than 0 keeps it from starting.
VIRSH = """#!/bin/sh
set -e
case $1 in
    define) [ -s "$2" ] ;;
    start) /etc/libvirt/hooks/qemu "$2" prepare begin - </dev/null && cat /srv/qedfs/vm1/disk.raw >/dev/null ;;
esac
"""
LIBVIRTD = "[Service]\nExecStart=/bin/sleep infinity\n"


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Machine]:
    with machine(tmp_path) as found:
        yield found


def put_overlay(host: Machine, path: str, url: str) -> None:
    """An overlay in the machine's own files."""
    host.path(Path(path).parent).mkdir(parents=True)
    create(host.path(Path(path)), url)


def paste(host: Machine, word: str) -> None:
    """Run the one block of the guide that has this word. The machine has its units elsewhere."""
    (block,) = (text for text in commands_tried_by("tests/service/test_guide.py") if word in text)
    text = block.replace("/etc/systemd/system/", f"{host.folder}/units/")
    done = host.booted.run("bash", "-euo", "pipefail", "-c", f"cd {ROOT}\n{text}")
    assert done.returncode == 0, f"{text}{done.stdout}{done.stderr}{host.log()}"


def test_the_service(host: Machine, tmp_path: Path) -> None:
    for unit in (host.folder / "units").glob("qedfs*"):
        unit.unlink()  # the block brings them
    with origin(tmp_path, 4 * MIB) as source:
        put_overlay(host, "/srv/vms/vm1.qed", source.url)
        paste(host, "enable --now qedfs@vm1")
        assert "complete" in host.qedfs("status", "/srv/mnt").stdout
        assert host.stop("qedfs@vm1.service") == 0


def test_mount_and_lines_of_fstab(host: Machine, tmp_path: Path) -> None:
    lines = [line for path in documents() for line in files(path, "fstab")]
    assert lines
    with origin(tmp_path, 4 * MIB) as source:
        put_overlay(host, "/srv/vms/vm1.qed", source.url)
        paste(host, "mount -t qedfs")
        for line in lines:
            host.path(Path("/etc/fstab")).write_text(line)
            done = host.booted.run("mount", "/srv/mnt")
            assert done.returncode == 0, done.stderr
            assert host.path(Path("/srv/mnt/vm1.raw")).stat().st_size == 4 * MIB
            assert host.qedfs("umount", "/srv/mnt").returncode == 0


def test_libvirt(host: Machine, tmp_path: Path) -> None:
    host.add_unit("libvirtd.service", LIBVIRTD)
    virsh = host.path(Path("/usr/local/bin/virsh"))
    virsh.write_text(VIRSH)
    virsh.chmod(0o755)
    host.booted.run("groupadd", "--force", "kvm")
    host.booted.run("useradd", "--system", "--gid", "kvm", "libvirt-qemu")
    with origin(tmp_path, 4 * MIB) as source:
        put_overlay(host, "/srv/vms/vm1/disk.qed", source.url)
        paste(host, "virsh define")
        assert host.is_mounted(Path("/srv/qedfs/vm1"))
        owner = host.booted.run("stat", "--format=%U:%G", "/srv/qedfs/vm1/disk.raw").stdout.strip()
        assert owner == "libvirt-qemu:kvm"
        assert host.stop("qedfs@vm1.service") == 0
