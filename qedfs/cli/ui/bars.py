"""Progress bars of many images, fitted into the size of a terminal. Pure: images as in `status` -> lines.

Owns how name, bar, percentage and note share a line. Must not know when lines are drawn (`screen.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rich.cells import cell_len
from rich.text import Text

from qedfs.cli.served_images import Image
from qedfs.cli.ui.layout import padded, printable, shortened
from qedfs.cli.ui.status_lines import fitted_images, fitted_summary, fitted_troubles, pace_of, percent
from qedfs.control.monitoring.progress_rate import Rate
from qedfs.units import format_seconds, format_size

NOTE_WIDTH = len("1023 MiB/s, 23h 59m")
LEAST_BAR = 4
NAME_SHARE = 3  # a name takes at most a third of the width


class Signs(NamedTuple):
    """The characters of a bar. They differ in shape, so that a bar can be read without colours."""

    done: str
    half: str
    missing: str


SIGNS = Signs("━", "╸", "─")
ASCII_SIGNS = Signs("#", "-", "-")


def bar_lines(images: Sequence[Image], width: int, height: int, signs: Signs = SIGNS) -> list[Text]:
    """A bar per image, a total bar and the troubles, in at most `height` lines of `width` cells."""
    if not images:
        return [Text("no overlays yet")]
    texts = fitted_troubles(images, width, height)
    served = [image for image in images if image["served"]]
    head = fitted_summary(images, width)
    bars = [_total(served)] if len(served) > 1 else []
    shown, left_out = fitted_images(served, height - len(head) - len(bars) - len(texts))
    bars += [(printable(image["name"]), image["populated"], image["total"], _note(image)) for image in shown]
    return [*map(Text, head), *_drawn(bars, width, signs), *map(Text, [*left_out, *texts])]


def copy_line(name: str, done: int, total: int, rate: Rate, width: int, signs: Signs = SIGNS) -> Text:
    """The bar of one copy of `total` bytes, with its pace and the remaining time."""
    pace = f"{format_size(round(rate.value))}/s" if rate.value else ""
    seconds = rate.seconds_for(total - done)
    note = ", ".join(filter(None, (pace, format_seconds(seconds) if seconds else "")))
    return _drawn([(printable(name), done, total, note)], width, signs)[0]


def _drawn(bars: Sequence[tuple[str, int, int, str]], width: int, signs: Signs) -> list[Text]:
    """Lines of name, bar, percentage and note, from (name, done, total, note)."""
    name_width = min(max((cell_len(name) for name, *_ in bars), default=0), width // NAME_SHARE)
    bar_width = max(LEAST_BAR, width - name_width - NOTE_WIDTH - len("  100%  "))
    lines: list[Text] = []
    for name, done, total, note in bars:
        line = Text(padded(shortened(name, name_width), name_width) + " ")
        line.append_text(_bar(done, total, bar_width, signs))
        lines.append(line.append(f" {percent(done, total):>4}  {note}"))
    return lines


def _total(images: Sequence[Image]) -> tuple[str, int, int, str]:
    """The sum of all images. They stream in parallel, so the remaining time is that of the slowest."""
    running = [image for image in images if image["state"] == "running"]
    rate = sum(image["rate"] for image in running)
    seconds = max((image["eta_seconds"] or 0 for image in running), default=0)
    pace = f"{format_size(rate)}/s" if rate else ""
    note = ", ".join(filter(None, (pace, format_seconds(seconds) if seconds else "")))
    return "all", sum(image["populated"] for image in images), sum(image["total"] for image in images), note


def _note(image: Image) -> str:
    """The text after the bar: the pace while the image streams, otherwise its state."""
    return ", ".join(filter(None, pace_of(image))) if image["state"] == "running" and image["rate"] else image["state"]


def _bar(populated: int, total: int, width: int, signs: Signs) -> Text:
    halves = 2 * width * populated // total if total else 2 * width
    style = "bar.complete" if halves < 2 * width else "bar.finished"
    bar = Text(signs.done * (halves // 2) + signs.half * (halves % 2), style=style)
    return bar.append(signs.missing * (width - len(bar)), style="bar.back")
