"""`qedfs create`: it looks at the backing, says what it found, and refuses what cannot be a disk."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from qedfs.format.header import NO_PROBE, decode_header
from qedfs.host.runtime import mount_folder
from qedfs.units import format_size

from ..fakes.http_server import FakeHttpServer
from ..harness.images import qemu_info, random_image
from ..harness.mounts import mounted, qedfs
from ..harness.process import free_port
from ..harness.servers import Nginx, black_hole, nginx
from ..source.qcow2.support import qemu_img
from .conftest import SIZE

MiB = 1 << 20
GiB = 1 << 30
SECRET = "gEhEiM5"


def features(overlay: Path) -> int:
    return decode_header(overlay.read_bytes(), overlay.stat().st_size).features


def mode(overlay: Path) -> int:
    return stat.S_IMODE(overlay.stat().st_mode)


def created(overlay: Path, *words: str) -> dict[str, Any]:
    return dict(json.loads(qedfs("create", overlay, *words, "--json").stdout))


@pytest.fixture
def qcow2(disk: Path) -> Path:
    """/disk.qcow2 of the web server: a disk of 1 GiB."""
    path = disk.with_name("disk.qcow2")
    qemu_img("convert", "-c", "-O", "qcow2", disk, path)
    qemu_img("resize", "-q", path, "1G")
    return path


def test_a_raw_disk_is_recorded_as_raw(web: Nginx, folder: Path) -> None:
    url, overlay = f"{web.url}/disk.img", folder / "disk.qed"
    done = qedfs("create", overlay, "--backing", url)
    assert done.stdout == f"{overlay}: 4.00 MiB over {url} (raw, 4.00 MiB)\n"
    assert done.stderr == ""
    assert features(overlay) & NO_PROBE


def test_a_qcow2_image_is_found_out(web: Nginx, folder: Path, qcow2: Path) -> None:
    url, overlay, stored = f"{web.url}/{qcow2.name}", folder / "disk.qed", format_size(qcow2.stat().st_size)
    done = qedfs("create", overlay, "--backing", url)
    assert done.stdout == f"{overlay}: 1.00 GiB over {url} (qcow2, zlib, {stored}, disk of 1.00 GiB)\n"
    assert not features(overlay) & NO_PROBE
    with mounted(overlay, folder / "mnt", "--no-stream") as mount, mount.path("disk.raw").open("rb") as file:
        assert file.read(SIZE) == (qcow2.parent / "disk.img").read_bytes()
        assert file.read(MiB) == bytes(MiB)


def test_the_keys_of_json(web: Nginx, folder: Path, qcow2: Path) -> None:
    url = f"{web.url}/{qcow2.name}"
    size = qcow2.stat().st_size
    made = {"overlay": str(folder / "a.qed"), "size": GiB, "backing": url, "backing_format": "qcow2"}
    looked = {"compression": "zlib", "disk_size": GiB, "stored_size": size}
    shape = {"cluster_size": 65536, "preallocation": "off"}
    assert created(folder / "a.qed", "--backing", url) == {**made, **looked, **shape}
    unknown = {"compression": None, "disk_size": None, "stored_size": None}
    made = {"overlay": str(folder / "b.qed"), "size": MiB, "backing": url, "backing_format": None}
    words = ("--backing", url, "--offline", "--size", "1M")
    assert created(folder / "b.qed", *words) == {**made, **unknown, **shape}
    made = {"overlay": str(folder / "c.qed"), "size": MiB, "backing": None, "backing_format": None}
    assert created(folder / "c.qed", "--size", "1M") == {**made, **unknown, **shape}


def test_a_larger_disk_ends_with_zeros(web: Nginx, folder: Path, disk: Path) -> None:
    overlay = folder / "disk.qed"
    done = qedfs("create", overlay, "--backing", f"{web.url}/disk.img", "--size", "6M")
    assert done.stdout.endswith("(raw, 4.00 MiB; zeros after it)\n")
    with mounted(overlay, folder / "mnt") as mount:
        assert mount.path("disk.raw").read_bytes() == disk.read_bytes() + bytes(2 * MiB)


def test_a_smaller_disk_must_be_asked_for(web: Nginx, folder: Path) -> None:
    words = ("create", folder / "disk.qed", "--backing", f"{web.url}/disk.img", "--size", "1M")
    done = qedfs(*words, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "qedfs: --size 1048576 is smaller than the disk in the backing (4194304 bytes, 4.00 MiB);"
        " --shrink cuts the disk off there\n"
    )
    assert not (folder / "disk.qed").exists()
    done = qedfs(*words, "--shrink")
    assert done.stdout.endswith("1.00 MiB over " + f"{web.url}/disk.img (raw, 4.00 MiB; cut off)\n")
    assert qemu_info(folder / "disk.qed")["virtual-size"] == MiB


def test_the_size_of_a_disk_of_odd_bytes_is_no_other(web: Nginx, folder: Path, disk: Path) -> None:
    os.truncate(disk, SIZE - 100)
    words = ("--backing", f"{web.url}/disk.img", "--size", str(SIZE - 100))
    done = qedfs("create", folder / "disk.qed", *words)
    assert done.stdout.endswith("(raw, 4.00 MiB)\n")
    assert qemu_info(folder / "disk.qed")["virtual-size"] == SIZE


def test_offline_nobody_is_asked(folder: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}/disk"
    for name, words, raw in (("a.qed", (), 0), ("b.qed", ("--backing-format", "raw"), NO_PROBE)):
        done = qedfs("create", folder / name, "--backing", url, "--offline", "--size", "1M", *words)
        assert done.stdout == f"{folder / name}: 1.00 MiB over {url} (not contacted)\n"
        assert features(folder / name) & NO_PROBE == raw
    done = qedfs("create", folder / "c.qed", "--backing", url, "--offline", check=False)
    assert (done.returncode, "--offline needs --size" in done.stderr) == (2, True)


def test_with_a_size_the_backing_is_looked_at_all_the_same(web: Nginx, folder: Path, qcow2: Path) -> None:
    made = created(folder / "disk.qed", "--backing", f"{web.url}/{qcow2.name}", "--size", "2G")
    assert (made["size"], made["disk_size"], made["backing_format"]) == (2 * GiB, GiB, "qcow2")
    done = qedfs("create", folder / "b.qed", "--backing", f"{web.url}/none", "--size", "2G", check=False)
    assert (done.returncode, "404" in done.stderr) == (4, True)


def test_quiet(web: Nginx, folder: Path) -> None:
    done = qedfs("create", folder / "disk.qed", "--backing", f"{web.url}/disk.img", "--quiet")
    assert (done.stdout, done.stderr) == ("", "")
    done = qedfs("create", folder / "local.qed", "--backing", folder.parent / "web/disk.img", "-q")
    assert (done.stdout, done.stderr) == ("", "")
    done = qedfs("create", folder / "b.qed", "--backing", f"{web.url}/none", "--quiet", check=False)
    assert (done.returncode, done.stderr.count("\n")) == (4, 1)


@pytest.mark.parametrize("words", [("{url}", "{overlay}"), ("{overlay}", "{url}"), ("{url}",)])
def test_the_url_goes_after_backing(folder: Path, words: tuple[str, ...]) -> None:
    url = f"http://user:{SECRET}@127.0.0.1/disk.raw?sig={SECRET}"
    overlay = folder / "my.qed"
    done = qedfs("create", *(word.format(url=url, overlay=overlay) for word in words), check=False)
    name = overlay if len(words) == 2 else "disk.qed"
    says = f"the URL goes after --backing: qedfs create {name} --backing http://127.0.0.1/disk.raw?sig=..."
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"qedfs: {says} (see qedfs create --help)\n"


def test_a_name_cannot_forge_a_line_or_a_colour(folder: Path) -> None:
    done = qedfs("create", folder / "a\nb\x1b[31m.qed", "--size", "1M")
    assert done.stdout == f"{folder}/a\\nb\\x1b[31m.qed: 1.00 MiB\n"


def test_an_option_that_is_given_twice(folder: Path) -> None:
    done = qedfs("create", folder / "disk.qed", "--size", "1M", "--size", "2M", check=False)
    assert (done.returncode, "--size is given 2 times" in done.stderr) == (2, True)


def test_an_overlay_that_is_there_costs_no_request(folder: Path) -> None:
    (folder / "disk.qed").write_text("precious")
    with FakeHttpServer(bytes(MiB)) as server:
        done = qedfs("create", folder / "disk.qed", "--backing", server.url(), check=False)
        assert (done.returncode, "exists already" in done.stderr) == (2, True)
        assert server.requests == []
    assert (folder / "disk.qed").read_text() == "precious"


# Secrets.


def test_a_login_in_the_url_makes_the_overlay_private(web: Nginx, folder: Path) -> None:
    login = web.url.replace("http://", f"http://user:{SECRET}@") + "/disk.img"
    token = web.url.replace("http://", f"http://{SECRET}@") + "/disk.img"
    for name, url in (("login.qed", login), ("token.qed", token)):
        done = qedfs("create", folder / name, "--backing", url, "--quiet")
        assert mode(folder / name) == 0o600
        assert done.stderr == (
            f"qedfs: the user name and password in the URL are stored in {folder / name}, which only its owner may read"
            " (mode 0600); to keep them out of it, put them into ~/.netrc or a --credentials file instead\n"
        )
    done = qedfs("create", folder / "signed.qed", "--backing", f"{web.url}/disk.img?sig={SECRET}")
    assert mode(folder / "signed.qed") == 0o600
    assert "the query of the URL, which may be a key, is stored in" in done.stderr
    assert SECRET not in done.stderr + done.stdout


def test_other_overlays_have_the_usual_mode(web: Nginx, folder: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    qedfs("create", folder / "a.qed", "--backing", f"{web.url}/disk.img")
    words = ("--offline", "--size", "1M", "--backing")
    qedfs("create", folder / "b.qed", *words, "nbd+unix:///x?socket=/s")
    qedfs("create", folder / "c.qed", *words, "nbds://alice@host/x")
    assert [mode(folder / name) for name in ("a.qed", "b.qed", "c.qed")] == [0o666 & ~umask] * 3


def test_a_complete_overlay_keeps_no_secret(web: Nginx, folder: Path) -> None:
    """Nor does anything that the mount has left; the overlay's mode stays."""
    overlay = folder / "disk.qed"
    host = web.url.removeprefix("http://")
    qedfs("create", overlay, "--backing", f"http://user:{SECRET}@{host}/disk.img?sig={SECRET}")
    assert SECRET.encode() in overlay.read_bytes()
    with mounted(overlay, folder / "mnt", "--verbose") as mount:
        mount.wait()
        runtime = mount_folder(str(mount.mountpoint))
        kept = [path for path in runtime.rglob("*") if path.is_file()]
        left = b"".join(path.read_bytes() for path in kept) + mount.output().encode()
        assert mount.unmount() == 0
    left += overlay.read_bytes()
    left += b"".join(path.read_bytes() for path in runtime.rglob("*") if path.is_file())
    assert SECRET.encode() not in left
    assert mode(overlay) == 0o600


# Servers that give no usable answer.


@pytest.mark.parametrize("behaviour", ["silence", "slow-body", "reset", "garbage", "status-503", "endless-header"])
def test_it_ends_with_one_line_whatever_the_server_does(folder: Path, behaviour: str) -> None:
    with FakeHttpServer(bytes(MiB)) as server:
        server.behaviour = behaviour
        words = ("--backing", server.url(), "--source-timeout", "500ms")
        done = qedfs("create", folder / "disk.qed", *words, check=False)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (4, "", 1)
        assert server.url() in done.stderr
    assert list(folder.iterdir()) == []


def test_a_black_hole(folder: Path) -> None:
    with black_hole() as url:
        words = ("--backing", url, "--source-timeout", "500ms")
        done = qedfs("create", folder / "disk.qed", *words, check=False)
    assert (done.returncode, done.stderr) == (4, f"qedfs: backing {url} gave no answer within 0.5 s\n")


# Web pages: what the server sends in place of a disk.


def test_a_login_page_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "login.html").write_text("<!DOCTYPE html><title>Sign in</title>")
    random_image(tmp_path / "disk.raw", MiB)
    with nginx(tmp_path, server="location = /disk.raw { return 302 /login.html; }") as server:
        done = qedfs("create", folder / "disk.qed", "--backing", f"{server.url}/disk.raw", check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (4, "", 1)
    assert f"{server.url}/disk.raw (redirected to {server.url}/login.html) looks like a web page" in done.stderr
    assert "~/.netrc" in done.stderr
    assert list(folder.iterdir()) == []


def test_the_user_has_the_last_word(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_text("<!DOCTYPE html><title>a disk of mine</title>")
    with nginx(tmp_path) as server:
        words = ("--backing", f"{server.url}/disk.raw", "--backing-format", "raw")
        done = qedfs("create", folder / "disk.qed", *words)
    assert done.stdout.endswith("(raw, 44 B)\n")
    assert features(folder / "disk.qed") & NO_PROBE


def test_a_name_that_no_mount_of_a_folder_serves_is_remarked_on(tmp_path: Path) -> None:
    words = ("create", "--offline", "--size", "1M", "--backing", "http://127.0.0.1:1/disk.raw")
    said = qedfs(*words, tmp_path / "disk.raw")
    assert said.stderr == (
        f"qedfs: {tmp_path}/disk.raw: a mount of its folder does not serve it, as its name does not end in .qed\n"
    )
    assert said.stdout.startswith(f"{tmp_path}/disk.raw: 1.00 MiB")
    assert qedfs(*words, "--quiet", tmp_path / "quiet.raw").stderr == ""
    assert qedfs(*words, tmp_path / "disk.qed").stderr == ""


def test_what_reads_do_while_the_backing_is_away_is_recorded(tmp_path: Path) -> None:
    backing = ["--backing", "nbd://localhost:9/", "--size", "1M", "--offline"]
    for name, words, recorded in (("a", ["--on-source-error", "wait:1h"], ("wait", 3600)), ("b", [], ("eio", None))):
        qedfs("create", tmp_path / name, *backing, *words)
        found = json.loads(qedfs("info", tmp_path / name, "--json").stdout)
        assert (found["on_source_error"], found["wait_bound_seconds"]) == recorded
    for words in (["--on-source-error", "wait", "--size", "1M"], ["--on-source-error", "later", *backing]):
        refused = qedfs("create", tmp_path / "c", *words, check=False)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr
    assert not (tmp_path / "c").exists()
