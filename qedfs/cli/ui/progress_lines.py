"""The progress of a mount as plain lines now and then, for a log or a pipe.

Owns when a line is due and what it says. No I/O, no clock: the caller tells the time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from qedfs.cli.served_images import Image
from qedfs.cli.ui.status_lines import percent, states_text
from qedfs.units import format_seconds, format_size

LINE_SECONDS = 10.0
STEPS = 10  # a line is due after each tenth of the whole, too


class ProgressLines:
    """Says which line is due. While nothing changes, no line is: a log must not fill up over a weekend."""

    def __init__(self) -> None:
        self._said_at: float | None = None
        self._step = 0
        self._populated = 0

    def line(self, now: float, images: Sequence[Image]) -> str | None:
        """The line that is due at `now`, in seconds of a monotonic clock; None if none is."""
        populated, total = (sum(image[key] or 0 for image in images) for key in ("populated", "total"))
        step = STEPS * populated // total if total else 0
        if self._said_at is not None:
            late = now - self._said_at >= LINE_SECONDS and populated != self._populated
            if step <= self._step and not late:
                # New overlays may have made the whole larger.
                self._step = min(step, self._step)
                return None
        first = self._said_at is None
        self._said_at, self._step, self._populated = now, step, populated
        # The first call only notes where the wait begins: a short one prints nothing.
        return None if first else _text(images, populated, total)


def _text(images: Sequence[Image], populated: int, total: int) -> str:
    running = [image for image in images if image["state"] == "running"]
    rate = sum(image["rate"] for image in running)
    seconds = max((image["eta_seconds"] or 0 for image in running), default=0)
    parts = [f"{percent(populated, total)} local, {format_size(populated)} of {format_size(total)}"]
    parts += [f"{format_size(rate)}/s"] if rate else []
    parts += [f"{format_seconds(seconds)} left"] if seconds else []
    parts += [states_text(Counter(image["state"] for image in images))] if len(images) > 1 else []
    return ", ".join(parts)
