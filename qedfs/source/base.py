"""The port behind which missing bytes come from: what a source is, and nothing of how it is reached.

Owns `Source`, `KnowsZeros`, `Identity`, `Extent`. Must not know overlays, clusters or who asks. A source judges every
answer before it hands a byte on: when `read` returns, the caller's buffer holds exactly the bytes asked for, of the
version that `identity` names; when it raises, the buffer's content is undefined and must not be used.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

WEAK = "W/"  # how a tag begins that different bytes may share
LAYOUT = "qcow2 file of "  # how the reader of qcow2 begins what it puts in the place of a date that it was not told


class Sameness(enum.Enum):
    """What two looks at a source say about its version."""

    SAME = enum.auto()  # a digest, a strong tag or a date says so
    PRESUMED = enum.auto()  # nothing speaks against it, and only a length, a weak tag or the like for it
    DOUBTED = enum.auto()  # what was told is told no longer, or by another server: a change until proved otherwise
    CHANGED = enum.auto()


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of a comparison; `why`: what speaks against the same version, in a few words for people."""

    sameness: Sameness
    why: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Identity:
    """Which version of which thing a source serves.

    `size` in bytes. `etag` is an HTTP entity tag, a weak one with its `W/`, or what another protocol has in its place;
    `last_modified` is the HTTP date as the server sent it. `digest` is one that the server publishes of the whole file,
    as `algorithm:hex`. `place` stands for the server that the bytes come from: tags of two servers cannot be compared.
    None and "" say that it was not told. `name` is the redacted URL after redirects, for humans only.
    """

    size: int
    etag: str | None = None
    last_modified: str | None = None
    name: str = ""
    digest: str | None = None
    place: str = ""

    @property
    def strong_etag(self) -> str | None:
        """The tag, if it stands for exactly these bytes (RFC 9110, section 8.8.1)."""
        return None if self.etag is None or self.etag.startswith(WEAK) else self.etag

    @property
    def validators(self) -> tuple[str | None, str | None]:
        """Tag and date."""
        return self.etag, self.last_modified

    def tells_as(self, other: Identity) -> bool:
        """Whether both tell the very same."""
        told = (other.size, other.etag, other.last_modified, other.digest or self.digest, other.place)
        return told == (self.size, self.etag, self.last_modified, self.digest or other.digest, self.place)

    def compare(self, shown: Identity) -> Verdict:
        """Judge whether a source that shows `shown` serves the version that self stands for.

        A digest outranks a strong tag, and that one a date (RFC 9110, section 8.8.1). Weak tags that differ prove a
        change; equal ones prove nothing. What self has and `shown` lacks leaves a doubt: the file may have been
        replaced by one without it.
        """
        if self.size != shown.size:
            return Verdict(Sameness.CHANGED, f"size was {self.size}, is now {shown.size}")
        if self.digest and shown.digest and self.digest.partition(":")[0] == shown.digest.partition(":")[0]:
            difference = _difference("digest", self.digest, shown.digest)
            return Verdict(Sameness.CHANGED if difference else Sameness.SAME, difference)
        elsewhere = bool(self.place and shown.place and self.place != shown.place)
        difference = self._difference(shown)
        if difference:
            return Verdict(Sameness.DOUBTED if elsewhere else Sameness.CHANGED, difference)
        if self.strong_etag and shown.strong_etag:
            return Verdict(Sameness.SAME)
        lost = self._lost(shown)
        if lost:
            return Verdict(Sameness.DOUBTED, lost)
        dated = self.last_modified is not None and not self.last_modified.startswith(LAYOUT)
        return Verdict(Sameness.SAME if dated and not elsewhere else Sameness.PRESUMED)

    def _difference(self, shown: Identity) -> str:
        if self.etag and shown.etag and self.etag.startswith(WEAK) == shown.etag.startswith(WEAK):
            difference = _difference("ETag", self.etag, shown.etag)
            if difference or self.strong_etag:
                return difference
        if self.last_modified and shown.last_modified:
            return _difference("Last-Modified", self.last_modified, shown.last_modified)
        return ""

    def _lost(self, shown: Identity) -> str:
        """What self has to compare with and `shown` has not."""
        if self.etag and (shown.etag is None or self.etag.startswith(WEAK) != shown.etag.startswith(WEAK)):
            return f"ETag was {self.etag}, is now {shown.etag or 'not told'}"
        if self.last_modified and not shown.last_modified:
            return f"Last-Modified was {self.last_modified}, is now not told"
        return ""

    def joined(self, other: Identity) -> Identity:
        """Self with what only `other` tells, which is the same version; self if that is nothing."""
        etag, last_modified = self.etag or other.etag, self.last_modified or other.last_modified
        digest = self.digest or other.digest
        if (etag, last_modified, digest) == (self.etag, self.last_modified, self.digest):
            return self
        return dataclasses.replace(self, etag=etag, last_modified=last_modified, digest=digest)


def _difference(what: str, old: str, new: str) -> str:
    return "" if old == new else f"{what} was {old}, is now {new}"


@dataclasses.dataclass(frozen=True, slots=True)
class Extent:
    """A stretch of the source: `zero` says that it reads as zeros, so that it need not cross the wire."""

    pos: int
    size: int
    zero: bool


class Source(Protocol):
    """Something that holds the bytes of a backing image. All sizes and positions are in bytes.

    Many tasks may call `read` and `extents` at once.
    """

    @property
    def identity(self) -> Identity:
        """The version that this source serves. Answers may tell more of it (`Identity.joined`): then another object."""
        ...

    @property
    def parallel(self) -> int:
        """How many background reads may usefully be in flight at once at the most."""
        ...

    @property
    def received(self) -> int:
        """Bytes of payload that have come so far, those of reads under way included where that is known.

        For measuring the rate: on a shared link, reads that left together also end together, in lumps.
        """
        ...

    async def read(self, pos: int, buffer: memoryview, *, urgent: bool = False) -> None:
        """Fill `buffer` with the bytes at `pos`; the range must lie inside `identity.size`.

        `urgent` reads (somebody waits for them) do not queue behind the others. Cancelling is safe: the
        connection is dropped or the reply is discarded, and `buffer` is not touched after the call has ended.

        Raises:
            SourceUnreachable: another try may succeed; the connection at fault has been dropped.
            SourceChanged: the answer shows another version than `identity`.
            SourceError: permanent.
        """
        ...

    async def extents(self, pos: int, size: int) -> Sequence[Extent] | None:
        """Tell which parts of the range read as zeros, or None if the source cannot tell.

        The extents are in order, without gaps, start at `pos` and end at or before `pos + size` (a server may
        describe less than it was asked for, but at least one byte). Same errors as `read`.
        """
        ...

    async def aclose(self) -> None:
        """Drop all connections. Reads in flight raise SourceUnreachable."""
        ...


@runtime_checkable
class KnowsZeros(Protocol):
    """What a source may be besides: one that holds tables, and can tell zeros without asking anybody."""

    def zeros_now(self, pos: int, size: int) -> bool:
        """Whether the range is known to read as zeros. False may mean that it is not known."""
        ...
