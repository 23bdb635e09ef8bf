"""The status of a mount for people: a table, troubles, a summary. Pure: status -> lines of text.

Owns the words and columns, and what is left out if there is little room. Must not know bars and colours (`bars.py`),
nor how the status was obtained.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from qedfs.cli.served_images import BROKEN, Image, trouble
from qedfs.cli.ui.layout import listed, printable, shortened, table, wrapped
from qedfs.units import format_seconds, format_size

HEADER = ("image", "state", "local", "of", "", "pace", "left")
ALIGNMENT = "<<>>>>>"
# The order of states in a summary. Other states come after these.
STATES = ("complete", "running", "waiting", "paused", "off", "failed", "source-changed", "broken")
# If there is too little room, images with the highest number are left out first. A broken image has a trouble line too.
GIVE_WAY = {BROKEN: 1, "complete": 2}
TROUBLES_SHARE = 3  # troubles get at most a third of the lines


def status_lines(found: dict[str, Any], width: int | None = None) -> list[str]:
    """The whole status, nothing shortened. Without a width, each image and each trouble is one line."""
    images = found["images"]
    lines = [f"{printable(found['mountpoint'])}: no overlays there"]
    if images:
        lines = list(table([HEADER, *map(row, images)], ALIGNMENT, width))
    for text in [*troubles(images), *releases(found), *restarts(found), *summary(images), *total_limit(found)]:
        lines += [text] if width is None else wrapped(text, width)
    return lines


def fitted_lines(found: dict[str, Any], width: int, height: int) -> list[str]:
    """As much of the status as fits, in lines that do not wrap. Complete images are left out first."""
    images = found["images"]
    if not images:
        return status_lines(found, width)
    texts = fitted_troubles(images, width, height)
    more = [*releases(found), *restarts(found), *total_limit(found)]
    head = [*fitted_summary(images, width), *(shortened(text, width) for text in more)]
    shown, left_out = fitted_images(images, height - len(head) - len(texts) - 1)
    return [*head, *table([HEADER, *map(row, shown)], ALIGNMENT, width, cut=True), *left_out, *texts]


def fitted_images(images: Sequence[Image], room: int) -> tuple[list[Image], list[str]]:
    """The images that fit into `room` lines, and a line about the others. Images in progress are kept longest."""
    if len(images) <= room:
        return list(images), []
    kept = sorted(images, key=lambda image: GIVE_WAY.get(image["state"], 0))[: max(0, room - 1)]
    names = {image["name"] for image in kept}
    return [image for image in images if image["name"] in names], [f"and {len(images) - len(kept)} more"]


def fitted_troubles(images: Sequence[Image], width: int, height: int) -> list[str]:
    """The troubles, one line each, in at most their share of the height."""
    texts = troubles(images)
    most = max(1, height // TROUBLES_SHARE)
    if len(texts) > most:
        texts = [*texts[: most - 1], f"and {len(texts) - most + 1} more troubles: see qedfs status"]
    return [shortened(text, width) for text in texts]


def fitted_summary(images: Sequence[Image], width: int) -> list[str]:
    """The summary, wrapped."""
    return [line for text in summary(images) for line in wrapped(text, width)]


def row(image: Image) -> tuple[str, ...]:
    """The table row of one image."""
    name, total, populated = printable(image["name"]), image["total"], image["populated"]
    state = f"{image['state']} (ro)" if image.get("read_only") else image["state"]
    if not total:
        return (name, state, "", "", "", "", "")
    pace, left = pace_of(image)
    return (name, state, format_size(populated), format_size(total), percent(populated, total), pace, left)


def percent(populated: int, total: int) -> str:
    """The percentage, rounded down so that 100% means complete. An empty image is complete."""
    return f"{100 * populated // total if total else 100}%"


def pace_of(image: Image) -> tuple[str, str]:
    """Rate and remaining time of a streaming image; "" for what is unknown."""
    rate, seconds = image["rate"], image["eta_seconds"]
    pace = f"{format_size(rate)}/s" if rate and image["state"] == "running" else ""
    return pace, format_seconds(seconds) if seconds else ""


def troubles(images: Sequence[Image]) -> list[str]:
    """What is wrong, and what images wait for. Images with the same trouble share a line."""
    names: dict[str, list[str]] = {}
    for image in images:
        text = trouble(image)
        if text is not None:
            names.setdefault(text, []).append(image["name"])
    return [printable(f"{listed(found)}: {text}") for text, found in names.items()]


def releases(found: dict[str, Any]) -> list[str]:
    """The images that have left the mount, and those that will."""
    done = found.get("released") or []
    ordered = [image["name"] for image in found["images"] if image.get("releasing")]
    lines = [f"released: {listed(done)}; qedfs release --undo serves it again"] if done else []
    if ordered:
        lines.append(f"released as soon as nobody uses it: {listed(ordered)}")
    return [printable(line) for line in lines]


def restarts(found: Mapping[str, Any]) -> list[str]:
    """How often the mount has got another server; nothing if it has its first one."""
    last = found.get("last_restart")
    if not last:
        return []
    count = f"{found['restarts']} times" if found["restarts"] > 1 else "once"
    reason, seconds = printable(last["reason"]), last["pause_seconds"]
    return [f"its server was replaced {count}, the last one after {reason}, in {seconds:.2f} s"]


def total_limit(found: dict[str, Any]) -> list[str]:
    """The limit of all images together, if there is one."""
    limit = found.get("limit_total")
    return [f"at most {format_size(limit)}/s for all streams together"] if limit else []


def summary(images: Sequence[Image]) -> list[str]:
    """The number of images per state, and how much of all is local. Empty for a single image."""
    if len(images) < 2:
        return []
    counts = Counter(image["state"] for image in images)
    populated, total = (sum(image[key] or 0 for image in images) for key in ("populated", "total"))
    local = f"{format_size(populated)} of {format_size(total)} local"
    return [f"{len(images)} images: {states_text(counts)}; {local}"]


def states_text(counts: Mapping[str, int]) -> str:
    """How many images are in which state, such as "2 complete, 1 running"."""
    states = [*(state for state in STATES if state in counts), *sorted(counts.keys() - set(STATES))]
    return ", ".join(f"{counts[state]} {state}" for state in states)
