"""`--credentials` through the commands: they get in, and what is in the file is shown nowhere."""

from __future__ import annotations

import os
from pathlib import Path

from qedfs.control.qmp.client import Client
from qedfs.host.runtime import mount_folder
from tests.fakes.http_server import FakeHttpServer
from tests.harness.mounts import mounted, qedfs
from tests.mount.support import CLUSTER_SIZE, MIB, read_direct

CANARY = "kAnArI3nVoGeL"


def credentials(folder: Path, url: str) -> Path:
    path = folder / "credentials.toml"
    path.touch(0o600)
    path.write_text(f'["{url}"]\nheaders = {{ PRIVATE-TOKEN = "{CANARY}" }}\n')
    return path


def test_all_commands_that_ask_servers(tmp_path: Path) -> None:
    seen: list[str] = []
    content = os.urandom(4 * MIB)
    overlay = tmp_path / "disk.qed"

    def run(*args: str | Path, code: int = 0) -> None:
        done = qedfs(*args, check=False)
        assert done.returncode == code, done.stderr
        seen.append(done.stdout + done.stderr)

    with FakeHttpServer(content) as server:
        server.behaviour = "token-wanted"
        server.cookie = CANARY
        file = credentials(tmp_path, server.url("/"))
        run("create", overlay, "--backing", server.url(), code=4)
        run("create", overlay, "--backing", server.url(), "--credentials", file)
        options = ("--verbose", "--no-stream", "--source-timeout", "1s", "--credentials", str(file))
        with mounted(overlay, tmp_path / "mnt", *options, own_interpreter=True) as mount:
            path = mount.path("disk.raw")
            assert read_direct(path, 0, CLUSTER_SIZE) == content[:CLUSTER_SIZE]
            for behaviour in ("status-403", "garbage", "reset"):
                server.queue.extend([behaviour] * 3)
                try:
                    read_direct(path, 2 * MIB, 4096)
                except OSError as exc:
                    seen.append(str(exc))
            server.queue.clear()
            run("status", mount.mountpoint, "--json")
            with Client.connect(str(mount.mountpoint)) as client:
                seen += [str(client.execute(query)) for query in ("query-named-block-nodes", "x-qedfs-status")]
            proc = Path("/proc", str(mount.pid))
            seen += [(proc / name).read_bytes().decode(errors="replace") for name in ("cmdline", "environ", "comm")]
            seen.append(Path("/proc/mounts").read_text(errors="replace"))
            kept = [found for found in mount_folder(str(mount.mountpoint)).rglob("*") if found.is_file()]
            seen += [found.read_bytes().decode(errors="replace") for found in kept]
            run("umount", mount.mountpoint)
            mount.wait_exit()
            seen.append(mount.output())
        run("export", overlay, tmp_path / "disk.raw", "--with-backing", "--credentials", file)
        assert (tmp_path / "disk.raw").read_bytes() == content
        seen.append(overlay.read_bytes().decode("latin-1"))
    assert str(file) in "".join(seen)  # the file is named, and not quoted
    assert CANARY not in "".join(seen)


def test_a_daemon_says_what_is_wrong_with_the_file(tmp_path: Path) -> None:
    overlay, file = tmp_path / "disk.qed", tmp_path / "credentials.toml"
    qedfs("create", overlay, "--size", "1M")
    file.touch(0o600)
    file.write_text(f'["https://h/"]\ntoken = "{CANARY}"\n')
    (tmp_path / "mnt").mkdir()
    for options in (("--daemon",), ()):
        done = qedfs("mount", overlay, tmp_path / "mnt", "--credentials", file, *options, check=False)
        assert done.returncode == 2
        assert f"{file}: [https://h/] has the unknown key 'token'" in done.stderr
        assert CANARY not in done.stderr


def test_create_says_what_a_mount_will_ask_for(tmp_path: Path) -> None:
    for url, says in [
        ("nbds://host/disk?tls-psk-file=/k", "--allow-backing /k --allow-backing nbds://host/disk"),
        ("nbds+unix:///d?socket=/s&tls-certificates=/c", "--allow-backing /s --allow-backing /c"),
    ]:
        done = qedfs("create", tmp_path / f"{len(url)}.qed", "--backing", url, "--offline", "--size", "1M")
        assert done.stderr.rstrip().endswith(says)
