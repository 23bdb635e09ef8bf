"""The lines of `qedfs list`: whole, escaped, and folded to a terminal."""

from __future__ import annotations

from typing import Any

from rich.cells import cell_len

from qedfs.cli.ui.list_lines import list_lines


def mount(place: str, states: dict[str, int] | None, **more: Any) -> dict[str, Any]:
    count = None if states is None else sum(states.values())
    entry: dict[str, Any] = {
        "mountpoint": place,
        "source": "/srv/vms",
        "user": "eve",
        "copies": [],
        "state": "served",
        "error": None,
    }
    return {**entry, "pid": 12, "image_count": count, "states": states, "populated": 1, "total": 4, **more}


def test_a_row_for_each_mount_and_its_troubles_below() -> None:
    dead = mount("/a\nb", None, state="dead", error="the server has died", pid=None, copies=["/c", "/d"])
    found = [mount("/one", {"running": 1}), mount("/many", {"off": 1, "complete": 2}), mount("/none", {}), dead]
    header, one, many, none, row, *below = list_lines(found)
    assert header.split() == ["mountpoint", "source", "images", "state", "local", "pid", "user"]
    assert one.split() == ["/one", "/srv/vms", "1", "running", "25%", "12", "eve"]
    assert many.split() == ["/many", "/srv/vms", "3", "2", "complete,", "1", "off", "25%", "12", "eve"]
    assert none.split() == ["/none", "/srv/vms", "0", "no", "overlays", "12", "eve"]
    assert row.split() == [r"/a\nb", "/srv/vms", "dead", "eve"]
    assert below == [r"/a\nb: the server has died", r"/a\nb: is also mounted at /c, /d"]
    assert list_lines([]) == ["no mounts"]


def test_long_places_fold_on_a_terminal() -> None:
    found = [mount("/" + "x" * 90, {"running": 1}, error="so " * 40)]
    assert all(cell_len(line) <= 70 for line in list_lines(found, 70))
    assert "".join(line.split()[0] for line in list_lines(found, 70)[1:5]).startswith("/xxxxx")
