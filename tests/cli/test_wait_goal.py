"""The goals of `qedfs wait --for`: how they are written, and which states reach them or never will."""

from __future__ import annotations

from typing import Any, cast

import pytest

from qedfs.cli.wait_goal import Goal, Local, Unused, parse_goal
from qedfs.control.qmp.client import Client
from qedfs.errors import QedfsError, ReadOnlyOverlay, SourceChanged, UsageError

IMAGE = {"name": "disk.raw", "state": "running", "served": True, "size": 1 << 20, "opens": 0, "reason": ""}


class NextMissing:
    """A client whose server knows where the next missing byte is."""

    def __init__(self, offset: int | None) -> None:
        self.offset = offset

    def execute(self, name: str, **arguments: Any) -> dict[str, int | None]:
        assert (name, arguments["device"]) == ("x-qedfs-next-missing", "disk.raw")
        return {"offset": self.offset}


def reached(goal: Goal, *, next_missing: int | None = 0, **changes: Any) -> bool:
    return goal.reached(cast("Client", NextMissing(next_missing)), {**IMAGE, **changes})


def test_how_goals_are_written() -> None:
    assert parse_goal("complete") == Local()
    assert isinstance(parse_goal("unused"), Unused)
    assert parse_goal("populated:1M-64M") == Local(1 << 20, 64 << 20)
    for text in ("", "completed", "populated:", "populated:5-5", "populated:2M-1M", "populated:x-y"):
        with pytest.raises(UsageError):
            parse_goal(text)


def test_unused() -> None:
    assert reached(Unused())
    assert not reached(Unused(), opens=1)
    assert Unused().held({**IMAGE, "opens": 2}) == "is open"
    assert Unused().held(IMAGE) is None


def test_complete() -> None:
    assert reached(Local(), state="complete")
    assert not reached(Local())
    assert Local().lacking({**IMAGE, "state": "paused"}) == "is paused"
    assert Local().held({**IMAGE, "state": "waiting", "reason": "the disk is busy"}) == "is waiting: the disk is busy"
    assert Local().held(IMAGE) is None


def test_a_range() -> None:
    assert reached(Local(0, 4096), next_missing=4096)
    assert not reached(Local(0, 4096), next_missing=4095)
    assert reached(Local(0, 4096), next_missing=None)
    assert reached(Local(0, 1 << 30), next_missing=1 << 20), "the image ends before the range"


def test_what_never_will_be() -> None:
    with pytest.raises(ReadOnlyOverlay, match="cannot become complete"):
        reached(Local(), read_only=True)
    failed: dict[str, Any] = {"state": "failed", "error": "away", "exit_code": 4, "overlay": "disk.qed"}
    with pytest.raises(QedfsError, match="away"):
        reached(Local(), **failed)


def test_text_and_exit_code_are_those_of_one_error() -> None:
    """The worst trouble now may be another one than that for which the stream has stopped."""
    stopped: dict[str, Any] = {
        "state": "source-changed",
        "reason": "disk.qed: the source is another version",
        "exit_code": SourceChanged.exit_code,
        "error": "disk.qed: the disk is full",
        "overlay": "disk.qed",
    }
    with pytest.raises(SourceChanged, match=r"^disk\.raw: the source is another version$"):
        reached(Local(), **stopped)
