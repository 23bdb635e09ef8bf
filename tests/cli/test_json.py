"""JSON is an interface: a command prints the keys and types that `contrib/docs/reference-json.md` has, and no others.

The tables of the page are the schema. Real commands on real mounts are held against it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from qedfs.cli.main import main

from ..harness.hang import HANG_OPTION
from ..harness.mounts import qedfs
from ..harness.namespace import own_mounts
from ..harness.servers import Nginx
from .support import daemon

PAGE = Path(__file__).parents[2] / "contrib" / "docs" / "reference-json.md"
ROW = re.compile(r"^\| `(\w+)` \| ([^|]+) \| [^|]+ \|$", re.MULTILINE)

Schema = dict[str, str]  # key -> type

SIMPLE: dict[str, Callable[[Any], bool]] = {
    "text": lambda value: isinstance(value, str),
    "integer": lambda value: type(value) is int,
    "number": lambda value: type(value) in (int, float),
    "true or false": lambda value: isinstance(value, bool),
    "true, false or null": lambda value: value is None or isinstance(value, bool),
    "counts": lambda value: isinstance(value, dict) and all(type(count) is int for count in value.values()),
}


def sections() -> Iterator[tuple[str, Schema]]:
    """The tables of the page by the words of their headings: "qedfs status" for one in backquotes, or an object."""
    for heading, body in re.findall(r"^##+ (.+)\n((?:(?!^##).*\n?)*)", PAGE.read_text(), re.MULTILINE):
        rows = dict(ROW.findall(body))
        commands = [f"qedfs {name}" for name in re.findall(r"`([^`]+)`", heading)]
        for name in commands or [heading]:
            yield name, rows


SCHEMAS = dict(sections())


def wrong(value: object, schema: str, where: str = "") -> list[str]:
    """In which places an object is not as the table of this heading says."""
    if not isinstance(value, dict):
        return [f"{where} is no object"]
    types = SCHEMAS[schema]
    needed = {key for key, kind in types.items() if not kind.endswith(", or absent")}
    found = [f"{where}.{key} is not in the page" for key in value.keys() - types.keys()]
    found += [f"{where}.{key} is missing" for key in needed - value.keys()]
    for key in value.keys() & types.keys():
        found += _wrong_value(value[key], types[key].removesuffix(", or absent"), f"{where}.{key}")
    return found


def _wrong_value(value: object, kind: str, where: str) -> list[str]:
    if kind in SIMPLE:
        return [] if SIMPLE[kind](value) else [f"{where} is {value!r}, not {kind}"]
    if kind.endswith(" or null"):
        return [] if value is None else _wrong_value(value, kind.removesuffix(" or null"), where)
    if kind.startswith("list of "):
        if not isinstance(value, list):
            return [f"{where} is no list"]
        return [text for part in value for text in _wrong_value(part, kind.removeprefix("list of "), f"{where}[]")]
    return wrong(value, kind, where)


def printed(*words: str | Path, code: int = 0) -> Any:
    """What a command prints, which must be one document that its table describes."""
    done = qedfs(*words, "--json", check=False)
    assert done.returncode == code, done.stderr
    found = json.loads(done.stdout)
    named = " ".join(str(word) for word in words[: 2 if words[0] in ("stream", "source") else 1])
    for one in found if named == "map" else [found]:
        assert wrong(one, f"qedfs {named}") == []
    return found


def commands(context: click.Context, prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    assert isinstance(context.command, click.Group)
    for name in context.command.list_commands(context):
        command = context.command.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands(click.Context(command, parent=context), f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def test_every_command_with_json_is_in_the_page_and_no_other() -> None:
    with_json = {
        f"qedfs {name}"
        for name, command in commands(click.Context(main))
        if any("--json" in option.opts for option in command.params)
    }
    assert with_json == {name for name in SCHEMAS if name.startswith("qedfs ")}
    assert all(SCHEMAS[name] for name in with_json)


def test_every_row_has_a_type_that_is_known() -> None:
    assert sum(line.startswith("| `") for line in PAGE.read_text().split("\n")) == len(ROW.findall(PAGE.read_text()))
    for types in SCHEMAS.values():
        for kind in types.values():
            plain = kind.removesuffix(", or absent")
            plain = plain if plain in SIMPLE else plain.removesuffix(" or null").removeprefix("list of ")
            assert plain in SIMPLE or SCHEMAS[plain]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"pos": 0, "size": 1, "next": None, "image": "a", "mountpoint": "/m", "more": 1}, ".more is not in the page"),
        ({"pos": 0, "size": 1, "next": None, "image": "a"}, ".mountpoint is missing"),
        ({"pos": True, "size": 1, "next": None, "image": "a", "mountpoint": "/m"}, ".pos is True, not integer"),
        ({"pos": 0, "size": None, "next": 1, "image": "a", "mountpoint": "/m"}, ".size is None, not integer"),
    ],
)
def test_a_difference_is_found(value: dict[str, Any], text: str) -> None:
    assert wrong(value, "qedfs stream step") == [text]


def test_what_is_printed_about_overlays(web: Nginx, folder: Path) -> None:
    assert printed("create", folder / "disk.qed", "--backing", f"{web.url}/disk.img")["disk_size"] == 4 << 20
    assert printed("create", folder / "empty.qed", "--size", "1M")["backing"] is None
    assert printed("info", folder / "disk.qed")["pin"] is None
    written = printed("export", folder / "disk.qed", folder / "disk.raw", "--with-backing")
    assert written["size"] == written["data_size"] == 4 << 20
    assert printed("map", folder / "disk.qed")[0]["depth"] == 1
    assert printed("check", folder / "disk.qed")["missing_clusters"] == 64
    assert printed("doctor")["source"] is None
    assert printed("doctor", f"{web.url}/disk.img")["source"]["size"] == 4 << 20


def test_what_is_printed_about_a_mount(web: Nginx, overlay: Path, folder: Path, mountpoint: Path) -> None:
    (folder / "bad.qed").write_text("no overlay")
    with daemon(folder, mountpoint, "--no-stream"):
        bad, disk = printed("status", mountpoint)["images"]
        assert (bad["size"], bad["condition"][0]["cause"]) == (None, "not-served")
        assert disk["counters"] is not None
        step = printed("stream", "step", mountpoint, "disk", "--offset", "64K")
        assert (step["pos"], step["next"]) == (64 << 10, (64 << 10) + step["size"])
        assert printed("map", mountpoint, "disk", "--missing")[0]["depth"] == 1
        assert printed("source", "on-error", mountpoint, "wait:5m")["images"][1]["wait_bound_seconds"] == 300
        (one,) = printed("source", "set", mountpoint, "disk", f"{web.url}/disk.img")["images"]
        assert one["backing"] == f"{web.url}/disk.img"
        (mountpoint / "disk.raw").read_bytes()
        assert printed("profile", mountpoint, "disk", folder / "boot.profile")["range_count"] > 0
        late = printed("wait", mountpoint, "disk", "--timeout", "100ms", code=7)
        assert (late["reached"], late["exit_code"], late["mounted"]) == (False, 7, True)
        for words in (("pause",), ("resume",), ("cancel",), ("start",)):
            (one,) = printed("stream", *words, mountpoint, "disk")["images"]
            assert one["name"] == "disk.raw"
        printed("stream", "limit", mountpoint, "disk", "0")
        assert printed("stream", "limit", "--total", mountpoint, "0")["mountpoint"] == str(mountpoint)
        done = printed("wait", mountpoint, "disk", "--timeout", HANG_OPTION)
        assert (done["reached"], done["error"], done["images"][0]["state"]) == (True, None, "complete")
        found = printed("status", mountpoint)
        assert found["sources"] == [] or found["sources"][0]["fetched"] >= 0
        assert printed("release", mountpoint, "disk")["released"]
        assert printed("status", mountpoint)["released"] == ["disk.raw"]
        qedfs("umount", mountpoint)
    gone = printed("wait", mountpoint, "--overlay", overlay)
    assert (gone["reached"], gone["mounted"], gone["images"]) == (True, False, [])


def test_what_is_printed_about_sources_and_pins(overlay: Path, mountpoint: Path) -> None:
    with daemon(overlay, mountpoint, "--no-stream"):
        with (mountpoint / "disk.raw").open("rb") as file:
            file.read(1)
        (source,) = printed("status", mountpoint)["sources"]
        assert source["size"] == 4 << 20
        qedfs("umount", mountpoint)
    assert printed("info", overlay)["pin"]["size"] == 4 << 20
    assert {extent["data"] for extent in printed("map", overlay)} == {True, False}


def test_what_a_wait_prints_if_there_is_no_mount() -> None:
    with own_mounts() as inside:
        done = inside.qedfs("wait", "--json", code=10)
    found = json.loads(done.stdout)
    assert wrong(found, "qedfs wait") == []
    assert (found["mountpoint"], found["mounted"], found["reached"], found["exit_code"]) == (None, False, False, 10)
    assert done.stderr == f"qedfs: {found['error']}\n"


def test_what_is_printed_about_all_mounts(overlay: Path, mountpoint: Path) -> None:
    with own_mounts() as inside:
        inside.qedfs("mount", overlay, mountpoint, "--daemon", "--no-stream")
        found = json.loads(inside.qedfs("list", "--json").stdout)
        assert wrong(found, "qedfs list") == []
        assert len(found["mounts"]) == 1
        inside.qedfs("umount", mountpoint)
