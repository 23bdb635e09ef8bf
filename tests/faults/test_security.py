"""What overlays and servers try to make a real mount do, and what becomes of the secrets in its URLs."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qedfs.control.qmp.client import Client
from qedfs.host.runtime import mount_folder
from qedfs.overlay.create import create_overlay
from tests.fakes.http_server import FakeHttpServer
from tests.faults.farm import FORBIDDEN_URL
from tests.harness.images import qemu_create
from tests.harness.mounts import Mount, mounted, qedfs
from tests.harness.process import Child, wait_for
from tests.harness.require import require, require_root
from tests.mount.support import CLUSTER_SIZE, MIB, read_direct

CANARY = "kAnArI3nVoGeL"

# In these, {secret} is a file that the mounting user can read and the overlay's maker cannot, {socket} a server's.
NAMES = (Path(__file__).parent / "hostile_names.txt").read_text().splitlines()


@contextlib.contextmanager
def traced(mount: Mount, log: Path) -> Iterator[None]:
    """Note what the process that serves the mount opens and connects to."""
    calls = "trace=open,openat,openat2,connect,sendto,sendmsg,sendmmsg,execve"
    tracer = Child([require("strace"), "-f", "-s", "300", "-p", str(mount.pid), "-e", calls], log)
    try:
        tracer.wait_until(lambda: "attached" in tracer.output(), "strace attached")
        yield
    finally:
        tracer.stop()


def _images(mount: Mount) -> dict[str, dict[str, Any]]:
    """The status of all images, by name."""
    with Client.connect(str(mount.mountpoint)) as client:
        return {image["name"]: image for image in client.execute("x-qedfs-status")["images"]}


def _looked_into(mount: Mount) -> int:
    """How many overlays are served, or known not to be; one that has just come is left alone at first."""
    return sum(image["served"] or image["error"] is not None for image in _images(mount).values())


def _told_of(mount: Mount) -> int:
    """Of how many overlays the log says why they are not served, or not streamed."""
    return len(set(re.findall(r"(?:not served: .*/|(?:ERROR|INFO|WARNING) )(\w+)\.(?:qed|raw): ", mount.output())))


def _peers(trace: str) -> set[str]:
    """The Internet addresses and Unix sockets that were connected or sent to."""
    found = re.findall(
        r'(?:connect|sendto|sendmsg|sendmmsg)\(.*?(inet_addr\("[^"]+"\)|inet_pton\([^)]+\)|sun_path=[^}]+)', trace
    )
    return set(found)


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    """No file is opened, nothing is connected to; each fails, and a good overlay is served beside them."""
    require_root()
    assert len(NAMES) >= 100
    overlays = tmp_path / "overlays"
    overlays.mkdir()
    (overlays / "secret").write_text(CANARY * 1000)
    place = {"secret": overlays / "secret", "folder": overlays, "folder_name": "overlays"}
    with socket.socket(socket.AF_UNIX) as listener, FakeHttpServer(b"x" * MIB) as server:
        server.behaviour, server.redirect_to = "redirect-302", FORBIDDEN_URL
        listener.bind(str(overlays / "socket"))
        listener.listen()
        with mounted(overlays, tmp_path / "mnt", "--source-timeout", "1s") as mount:
            with traced(mount, tmp_path / "trace"):
                for number, name in enumerate(NAMES):
                    text = name.format(**place, socket=overlays / "socket")
                    create_overlay(str(overlays / f"{number}.qed"), image_size=MIB, backing=text)
                create_overlay(str(overlays / "redirected.qed"), image_size=MIB, backing=server.url())
                qemu_create(overlays / "good.qed", size=MIB)
                # The log first: a status of a hundred images takes the mount longer than to look into one of them.
                wait_for(lambda: _told_of(mount) > len(NAMES), "a line on each of the new overlays")
                wait_for(lambda: _looked_into(mount) == len(NAMES) + 2, "the new overlays")
                for path in mount.mountpoint.iterdir():
                    if path.name != "good.raw":
                        with pytest.raises(OSError, match=r"Permission denied|Input/output"):
                            read_direct(path, 0, 4096)
                assert mount.path("good.raw").read_bytes() == bytes(MIB)
            assert CANARY not in mount.output()
            images = _images(mount)
            assert "--allow-backing" in images["0.raw"]["error"]
            assert "169.254.169.254" in images["redirected.raw"]["error"]
            assert mount.unmount() == 0
    trace = (tmp_path / "trace").read_text(errors="replace")
    assert 'good.qed"' in trace  # it does see what is opened
    opened = set(re.findall(r'open(?:at2?)?\([^"]*"([^"]*)"', trace))
    assert not {path for path in opened if re.search(r"secret|shadow|passwd|/dev/(zero|mem)|environ", path)}
    # The C library asks its name cache about what looks like a name.
    assert _peers(trace) - {'sun_path="/var/run/nscd/socket"'} == {'inet_addr("127.0.0.1")'}
    assert "execve" not in trace


def test_secrets_are_shown_nowhere(tmp_path: Path) -> None:
    """User name, password, query of the URL and of where it redirects to, through all commands, logs and faults."""
    seen: list[str] = []
    with FakeHttpServer(os.urandom(MIB)) as target, FakeHttpServer(b"") as server:
        server.behaviour = "redirect-302"
        server.redirect_to = target.url(f"/real?X-Amz-Signature={CANARY}")
        url = server.url(f"/disk?token={CANARY}", userinfo=f"{CANARY}:{CANARY}")
        overlay = tmp_path / "disk.qed"
        create_overlay(str(overlay), image_size=MIB, backing=url)

        def run(*args: str | Path) -> None:
            done = qedfs(*args, check=False)
            seen.append(done.stdout + done.stderr)

        run("create", tmp_path / "other.qed", "--backing", url)
        run("create", tmp_path / "other.qed", "--backing", url)  # exists
        run("create", tmp_path / "third.qed", "--backing", f"ftp://{CANARY}:{CANARY}@host/{CANARY[:0]}")
        for command in ("info", "map", "check"):
            run(command, overlay)
        run("info", overlay, "--json")
        options = ("--verbose", "--no-stream", "--source-timeout", "1s")
        with mounted(overlay, tmp_path / "mnt", *options, own_interpreter=True) as mount:
            path = mount.path("disk.raw")
            assert len(read_direct(path, 0, CLUSTER_SIZE)) == CLUSTER_SIZE
            for cluster, behaviour in enumerate(("wrong-start", "status-403", "garbage", "other-etag"), start=2):
                target.behaviour = behaviour
                with pytest.raises(OSError, match="Input/output"):
                    read_direct(path, cluster * CLUSTER_SIZE, 4096)
                seen.append(str(_images(mount)))
            run("status", mount.mountpoint)
            run("stream", "step", mount.mountpoint, "disk.raw")
            run("wait", mount.mountpoint, "--timeout", "1s")
            run("umount", overlay)
            run("export", overlay, tmp_path / "out.raw")
            with Client.connect(str(mount.mountpoint)) as client:
                queries = ("query-block-jobs", "query-named-block-nodes", "query-jobs", "x-qedfs-status")
                seen += [str(client.execute(query)) for query in queries]
            proc = Path("/proc", str(mount.pid))
            seen += [(proc / name).read_bytes().decode(errors="replace") for name in ("cmdline", "environ", "comm")]
            seen.append(Path("/proc/mounts").read_text(errors="replace"))
            kept = [found for found in mount_folder(str(mount.mountpoint)).rglob("*") if found.is_file()]
            seen += [found.read_bytes().decode(errors="replace") for found in kept]
            run("umount", mount.mountpoint)
            mount.wait_exit()
            seen.append(mount.output())
    assert "disk?token=" in "".join(seen)  # the URL is named, without what is secret in it
    assert CANARY not in "".join(seen)
