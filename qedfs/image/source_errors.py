"""The rule of an image for a source that cannot be reached: an error for the reader, or a wait for the source.

Pure. Owns the rule and its spelling in the overlay's record. Must not know how a request waits.
"""

from __future__ import annotations

import dataclasses
import re

_STORED = re.compile(r"wait(?::([0-9]{1,9}))?", re.ASCII)

MOST_BOUND_SECONDS = 10**9 - 1  # what the record can hold


@dataclasses.dataclass(frozen=True, slots=True)
class OnSourceError:
    """`wait`: requests wait until the source is back, at most `bound_seconds` in all, or for ever if that is None.

    Otherwise they get EIO after the deadline of the source (`--source-timeout`).
    """

    wait: bool = False
    bound_seconds: int | None = None

    @property
    def action(self) -> str:
        """The word for it: "eio" or "wait"."""
        return "wait" if self.wait else "eio"

    def stored(self) -> str:
        """The text in the overlay's record; "" for the default, which is left out."""
        if not self.wait:
            return ""
        return "wait" if self.bound_seconds is None else f"wait:{self.bound_seconds}"


EIO = OnSourceError()


def from_stored(text: str) -> OnSourceError:
    """The rule in a record. A text that this version does not know stands for the default."""
    found = _STORED.fullmatch(text)
    if found is None:
        return EIO
    return OnSourceError(wait=True, bound_seconds=None if found[1] is None else int(found[1]))
