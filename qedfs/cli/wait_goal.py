"""The goals of `qedfs wait --for`, and how the status of an image shows that one is reached.

Owns which state ends the wait for a goal with an error. Must not know deadlines, nor what is printed meanwhile
(`cli/plain/wait.py`).
"""

from __future__ import annotations

import re
from typing import NamedTuple, Protocol

from qedfs.cli.served_images import BROKEN, STOPPED, Image, failure_of
from qedfs.control.qmp.client import Client
from qedfs.errors import ReadOnlyOverlay, UsageError
from qedfs.units import parse_size

_RANGE = r"^populated:([^-]+)-([^-]+)$"
# States that end only when somebody acts.
_ENDED = frozenset({*STOPPED, BROKEN})
HELD_STATES = {
    "off": "is not being streamed; qedfs stream start would begin it",
    "paused": "is paused",
    "standby": "is in standby and keeps nothing until qedfs activate",
    "waiting": "is waiting",
}


class Goal(Protocol):
    """A state that each image must reach. Its str() fits into "not ... within the timeout"."""

    def reached(self, client: Client, image: Image) -> bool:
        """Whether the image has reached it. Raises an error if it never can."""
        ...

    def held(self, image: Image) -> str | None:
        """Why the image may not get there by itself, such as "is paused"; None if it will."""
        ...

    def lacking(self, image: Image) -> str | None:
        """The state of an image that has not reached it, for the message after a timeout; None if it has."""
        ...


class Unused:
    """Nobody has the image open."""

    def __str__(self) -> str:
        return "unused"

    def reached(self, client: Client, image: Image) -> bool:
        """Whether the image is closed."""
        return not image["opens"]

    def held(self, image: Image) -> str | None:
        """The text "is open" if the image is open; None if it is closed."""
        return "is open" if image["opens"] else None

    lacking = held


class Local(NamedTuple):
    """A range of bytes of each image is local; without `end`, the whole image is complete."""

    start: int = 0
    end: int | None = None

    def __str__(self) -> str:
        return "complete" if self.end is None else "populated"

    def reached(self, client: Client, image: Image) -> bool:
        """Whether the range is local. Raises an error if it never will be."""
        if image["state"] == "complete" or self._is_local(client, image):
            return True
        if image["state"] in _ENDED:
            raise failure_of(image)
        if image.get("read_only"):
            raise ReadOnlyOverlay(f"{image['name']}: is read-only and keeps nothing, so it cannot become {self}")
        return False

    def held(self, image: Image) -> str | None:
        """Why the stream does not go on by itself."""
        held = HELD_STATES.get(image["state"])
        return held and held + (f": {image['reason']}" if image["reason"] else "")

    def lacking(self, image: Image) -> str | None:
        """The state of an image that is not complete."""
        return None if image["state"] == "complete" else f"is {image['state']}"

    def _is_local(self, client: Client, image: Image) -> bool:
        if self.end is None or not image["served"]:
            return False
        found = client.execute("x-qedfs-next-missing", device=image["name"], offset=self.start)["offset"]
        return found is None or found >= min(self.end, image["size"])


def parse_goal(text: str) -> Goal:
    """The goal of `--for`. Raises UsageError."""
    if text == "complete":
        return Local()
    if text == "unused":
        return Unused()
    found = re.match(_RANGE, text)
    if found is None:
        raise UsageError(f"--for {text}: write complete, unused, or populated:START-END like populated:0-64M")
    start, end = parse_size(found[1]), parse_size(found[2])
    if end <= start:
        raise UsageError(f"--for {text}: the range is empty")
    return Local(start, end)
