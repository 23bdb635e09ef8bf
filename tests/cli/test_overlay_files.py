"""Commands on overlay files, without a mount."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import trio

from qedfs.cli.main import main
from qedfs.format.record import Pin, digest
from qedfs.overlay.create import create_overlay
from qedfs.overlay.open import open_overlay

from ..harness.images import qemu_check, qemu_create, qemu_info, qemu_io, qemu_same, sparse_image
from ..harness.mounts import mounted, qedfs
from ..harness.process import free_port
from ..harness.servers import Nginx, nbdkit
from .conftest import SIZE

# create


def test_create_takes_the_size_of_its_backing(web: Nginx, folder: Path) -> None:
    done = qedfs("create", folder / "disk.qed", "--backing", f"{web.url}/disk.img", "--json")
    made = json.loads(done.stdout)
    assert made["size"] == SIZE
    info = qemu_info(folder / "disk.qed")
    assert info["virtual-size"] == SIZE
    assert info["backing-filename"] == f"{web.url}/disk.img"
    assert info["backing-filename-format"] == "raw"


def test_create_over_nbd(folder: Path) -> None:
    with nbdkit("memory", "3M") as server:
        done = qedfs("create", folder / "disk.qed", "--backing", server.url)
    assert "3.00 MiB" in done.stdout
    assert "--allow-backing" in done.stderr


def test_create_over_a_file_beside_the_overlay(folder: Path) -> None:
    sparse_image(folder / "base.raw", 1 << 20)
    done = qedfs("create", folder / "disk.qed", "--backing", "base.raw", "--cluster-size", "4K", "--table-size", "2")
    assert f"--allow-backing {folder / 'base.raw'}" in done.stderr
    assert qemu_info(folder / "disk.qed")["cluster-size"] == 4096
    assert qemu_same(folder / "disk.qed", folder / "base.raw")


@pytest.mark.parametrize("backing", [b"http://127.0.0.1:1/\xff", b"nbd://127.0.0.1:1/\xff", b"\xff.raw"])
@pytest.mark.parametrize("size", [(), ("--size", "1M")])
def test_a_backing_name_must_be_utf_8(folder: Path, backing: bytes, size: tuple[str, ...]) -> None:
    (folder / os.fsdecode(b"\xff.raw")).write_bytes(bytes(4096))
    done = qedfs("create", folder / "disk.qed", "--backing", os.fsdecode(backing), *size, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"qedfs: the backing name is not UTF-8; [^\n]+\n", done.stderr), done.stderr
    assert not (folder / "disk.qed").exists()


def test_create_without_backing(folder: Path) -> None:
    qedfs("create", folder / "disk.qed", "--size", "1.5M")
    assert qemu_info(folder / "disk.qed")["virtual-size"] == 3 << 19
    assert qemu_check(folder / "disk.qed") == (0, 0)


@pytest.mark.parametrize(
    ("arguments", "exit_code", "text"),
    [
        (["--backing", "{url}/nope.img"], 4, "404"),
        (["--backing", "http://127.0.0.1:{port}/x", "--source-timeout", "300ms"], 4, "127.0.0.1"),
        (["--backing", "/nonexistent/base.raw"], 4, "No such file"),
        (["--backing", "127.0.0.1:8080/disk.img"], 2, "no such file; a URL begins with its scheme, like http://"),
        (["--backing", "gopher://x/y"], 2, "gopher"),
        (["--backing", "{url}/disk.img", "--size", "lots"], 2, "lots"),
        (["--backing", "{url}/disk.img", "--cluster-size", "5000"], 2, "power of two"),
        (["--backing", "{url}/disk.img", "--backing-format", "qcow2"], 4, "is not a qcow2 image"),
        (["--backing", "{url}/disk.img", "--backing-format", "qed"], 4, "is not a qed image"),
        (["--backing", "{url}/disk.img", "--backing-format", "vmdk"], 2, "vmdk"),
        (["--nonsense"], 2, "nonsense"),
        ([], 2, "--size"),
    ],
)
def test_create_says_what_is_wrong(web: Nginx, folder: Path, arguments: list[str], exit_code: int, text: str) -> None:
    words = [word.format(url=web.url, port=free_port()) for word in arguments]
    done = qedfs("create", folder / "disk.qed", *words, check=False)
    assert done.returncode == exit_code
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert list(folder.iterdir()) == []


def test_create_never_replaces(web: Nginx, folder: Path) -> None:
    (folder / "disk.qed").write_text("precious")
    done = qedfs("create", folder / "disk.qed", "--backing", f"{web.url}/disk.img", check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert (folder / "disk.qed").read_text() == "precious"


def test_create_shows_no_password(web: Nginx, folder: Path) -> None:
    url = web.url.replace("http://", "http://user:geheim@")
    done = qedfs("create", folder / "a.qed", "--backing", f"{url}/disk.img?sig=geheim", "--json")
    failed = qedfs("create", folder / "b.qed", "--backing", f"{url}/nope.img?sig=geheim", check=False)
    shown = qedfs("info", folder / "a.qed").stdout + qedfs("info", folder / "a.qed", "--json").stdout
    assert "geheim" not in done.stdout + done.stderr + failed.stdout + failed.stderr + shown


# info, map, check


@pytest.fixture
def overlay(folder: Path) -> Path:
    """Sixteen clusters: data at 1 and 2, zeros at 3 and 4, the rest missing."""
    sparse_image(folder / "base.raw", 1 << 20, {0: b"x" * (1 << 20)})
    path = qemu_create(folder / "disk.qed", folder / "base.raw")
    qemu_io(path, "write -P 7 64k 128k", "write -z 192k 128k")
    return path


def test_info(overlay: Path) -> None:
    found = json.loads(qedfs("info", overlay, "--json").stdout)
    assert (found["size"], found["populated"], found["cluster_size"]) == (1 << 20, 256 << 10, 65536)
    assert found["backing"].endswith("base.raw")
    assert found["backing_format"] == "raw"
    assert not found["complete"]
    assert "256 KiB (25%)" in qedfs("info", overlay).stdout


def test_info_says_what_the_overlay_records_of_its_source(folder: Path, mountpoint: Path) -> None:
    path = folder / "disk.qed"
    qedfs("create", path, "--standby", "--backing", "nbd://localhost:9/", "--size", "1M", "--offline")
    with mounted(path, mountpoint):
        qedfs("source", "on-error", mountpoint, "wait:1h")
    found = json.loads(qedfs("info", path, "--json").stdout)
    assert (found["standby"], found["on_source_error"], found["wait_bound_seconds"]) == (True, "wait", 3600)
    lines = " ".join(qedfs("info", path).stdout.split())
    assert "standby: keeps nothing until qedfs activate" in lines
    assert "source away: reads wait for it, for 1h 00m at most" in lines


def test_map_in_the_shape_of_qemu(overlay: Path) -> None:
    found = json.loads(qedfs("map", overlay, "--json").stdout)
    shapes = [(e["start"] >> 16, e["length"] >> 16, e["depth"], e["present"], e["zero"], e["data"]) for e in found]
    assert shapes == [
        (0, 1, 1, False, False, False),
        (1, 2, 0, True, False, True),
        (3, 2, 0, True, True, False),
        (5, 11, 1, False, False, False),
    ]
    with overlay.open("rb") as file:
        file.seek(found[1]["offset"])
        assert file.read(131072) == b"\x07" * 131072


def test_map_without_backing_reads_as_zeros(folder: Path) -> None:
    qedfs("create", folder / "disk.qed", "--size", "1T")
    extent = {"start": 0, "length": 1 << 40, "depth": 0, "present": False, "zero": True, "data": False}
    assert json.loads(qedfs("map", folder / "disk.qed", "--json").stdout) == [extent]


def test_map_as_a_picture(overlay: Path) -> None:
    picture, *legend = qedfs("map", overlay, env={"PYTHONIOENCODING": "utf-8"}).stdout.splitlines()
    assert picture == "·██░░···········"
    assert legend == [
        "█ data 128 KiB, ░ zeros 128 KiB, · missing 768 KiB, ▒ in part",
        "one character is 64.0 KiB, the image 1.00 MiB",
    ]
    picture, *_ = qedfs("map", overlay, env={"PYTHONIOENCODING": "ascii"}).stdout.splitlines()
    assert picture == ".##00..........."


def test_picture_of_a_large_image_has_few_lines(folder: Path) -> None:
    path = qemu_create(folder / "disk.qed", size=1 << 40)
    qemu_io(path, "write 512G 64k")
    *rows, _, scale = qedfs("map", path, env={"PYTHONIOENCODING": "ascii"}).stdout.splitlines()
    assert [len(row) for row in rows] == [80] * 12 + [64]
    assert "".join(rows).index("#") == 512
    assert "".join(rows).count("#") == 1
    assert scale == "one character is 1.00 GiB, the image 1.00 TiB"


def test_check_of_a_sound_overlay(overlay: Path) -> None:
    report = json.loads(qedfs("check", overlay, "--json").stdout)
    keys = ("data_clusters", "zero_clusters", "corruptions", "leaked_clusters")
    assert [report[key] for key in keys] == [2, 2, 0, 0]
    assert "sound" in qedfs("check", overlay).stdout


def damage(overlay: Path) -> None:
    """Lets the entry of cluster 1 point behind the file's end."""
    data = overlay.read_bytes()
    (l1,) = struct.unpack_from("<Q", data, 40)
    (l2,) = struct.unpack_from("<Q", data, l1)
    with overlay.open("r+b") as file:
        file.seek(l2 + 8)
        file.write(struct.pack("<Q", 1 << 40))


def test_check_finds_and_mends_damage(overlay: Path) -> None:
    damage(overlay)
    found = qedfs("check", overlay, check=False)
    assert found.returncode == 3
    assert "damaged" in found.stdout
    assert "L2 entry 1" in found.stderr
    mended = json.loads(qedfs("check", overlay, "--repair", "--json").stdout)
    assert (mended["repaired"], mended["corruptions"]) == (1, 0)
    after = qedfs("check", overlay)
    # Its cluster is a leak now, which is said and is no error.
    assert "leaked:   1 clusters" in after.stdout
    assert qemu_check(overlay).corruptions == 0


@pytest.mark.parametrize("command", ["info", "map", "check"])
def test_files_that_are_no_overlays(folder: Path, command: str) -> None:
    (folder / "text.qed").write_text("hello")
    done = qedfs(command, folder / "text.qed", check=False)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == f"qedfs: {folder / 'text.qed'}: not a QED image: the file is shorter than a header\n"
    assert qedfs(command, folder / "nope.qed", check=False).returncode == 2
    assert qedfs(command, folder, check=False).returncode == 3


def test_an_image_in_a_mount_is_not_its_overlay(folder: Path, mountpoint: Path) -> None:
    overlay = qemu_create(folder / "disk.qed", size=1 << 20)
    with mounted(overlay, mountpoint):
        image = mountpoint / "disk.raw"
        for command, *rest in (["info"], ["map"], ["check"], ["export", str(folder / "out.raw")]):
            done = qedfs(command, image, *rest, check=False)
            assert (done.returncode, done.stdout) == (3, "")
            assert done.stderr == (
                f"qedfs: {image}: is the image in a mount, not its overlay; name the overlay: "
                "qedfs list shows where it is\n"
            )
            done = qedfs(command, mountpoint, *rest, check=False)
            assert (done.returncode, done.stderr.count("\n")) == (3, 1)
            assert f"{mountpoint}: is a mount, not an overlay" in done.stderr
        for words in (["status"], ["umount"], ["stream", "pause"]):
            done = qedfs(*words, image, check=False)
            assert (done.returncode, done.stdout) == (2, "")
            assert done.stderr == f"qedfs: {image}: is not a folder; name the folder of the mount: {mountpoint}\n"


# the command itself


def commands(group: click.Group) -> Iterator[tuple[list[str], click.Command]]:
    """Each command with the words that call it."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield [name], command
        if isinstance(command, click.Group):
            yield from (([name, *words], inner) for words, inner in commands(command))


def test_help_of_the_command() -> None:
    text = qedfs("--help").stdout
    assert "Exit codes" in text
    assert "_QEDFS_COMPLETE=bash_source" in text


@pytest.mark.parametrize("words", [words for words, _ in commands(main)], ids=" ".join)
def test_help_of_every_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert ended.value.code == 0
    out, err = capsys.readouterr()
    assert out.startswith("Usage:")
    assert err == ""


def test_every_option_and_every_command_has_a_help_text() -> None:
    found = [command for _, command in commands(main)]
    assert [command.name for command in found if not command.help or not command.short_help] == []
    options = [option for command in found for option in command.params if isinstance(option, click.Option)]
    assert [option.name for option in options if not option.help and not option.hidden] == []


def test_version() -> None:
    assert qedfs("--version").stdout.startswith("qedfs, version ")


def test_nobody_reads_on(overlay: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "qedfs", "map", overlay, "--json"], stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_info_tells_what_the_version_is_known_by(tmp_path: Path) -> None:
    overlay = tmp_path / "disk.qed"
    create_overlay(str(overlay), image_size=SIZE, backing="nbd://host/")
    pin = Pin(digest("nbd://host/"), SIZE, 'W/description "build 1"', None, "md5:00", "", "0:0123456789ab", "mine")

    async def store() -> None:
        opened = await open_overlay(str(overlay), writable=True)
        await opened.change_record(lambda record: dataclasses.replace(record, pin=pin))
        await opened.close()

    trio.run(store)
    told = json.loads(qedfs("info", overlay, "--json").stdout)["pin"]
    assert told == {
        "size": SIZE,
        "etag": 'W/description "build 1"',
        "last_modified": None,
        "digest": "md5:00",
        "identity": "mine",
        "sampled_blocks": 1,
    }
    shown = qedfs("info", overlay).stdout
    assert f'pinned to {SIZE} bytes, W/description "build 1", md5:00, called mine, 1 sampled block' in shown
