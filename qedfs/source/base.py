"""The interface of a source: reads, extents, and the identity that tells versions apart.

Owns `Source`, `KnowsZeros`, `HasFile`, `Gathers`, `Identity`, `Extent`. Must not know how a source is reached, nor
overlays, clusters or who reads. A source validates every answer before it passes a byte on. When `read` returns, the
caller's buffer holds exactly the requested bytes, of the version that `identity` describes. When `read` raises, the
content of the buffer is undefined and must not be used.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

WEAK = "W/"  # prefix of a weak tag, which different bytes may share
LAYOUTS = ("qcow2 file of ", "QED file of ")  # begin what the readers of formats put in place of a date (`layout_mark`)


class Sameness(enum.Enum):
    """Whether two identities stand for the same version."""

    SAME = enum.auto()  # a digest, a strong tag or a date proves it
    PRESUMED = enum.auto()  # no contradiction, but no more evidence than a length, a weak tag or the like
    DOUBTED = enum.auto()  # evidence is missing now, or comes from another server: a change unless proved otherwise
    CHANGED = enum.auto()


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of a comparison. `why`: the evidence against the same version, in a few words for people."""

    sameness: Sameness
    why: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Identity:
    """Which version of which file a source serves.

    `size` in bytes. `etag` is an HTTP entity tag, including the `W/` of a weak one, or another protocol's equivalent.
    `last_modified` is the HTTP date as the server sent it. `digest` is the digest of the whole file that the server
    publishes, as `algorithm:hex`. `place` identifies the server that the bytes come from, since the tags of two servers
    cannot be compared. None and "" mean that the server did not say. `name` is the redacted URL after redirects, for
    people only.
    """

    size: int
    etag: str | None = None
    last_modified: str | None = None
    name: str = ""
    digest: str | None = None
    place: str = ""

    @property
    def strong_etag(self) -> str | None:
        """The tag if it is strong, so that it identifies the exact bytes (RFC 9110, section 8.8.1)."""
        return None if self.etag is None or self.etag.startswith(WEAK) else self.etag

    @property
    def validators(self) -> tuple[str | None, str | None]:
        """Tag and date."""
        return self.etag, self.last_modified

    def tells_as(self, other: Identity) -> bool:
        """Whether both report exactly the same values. A digest that only one of them has does not count."""
        told = (other.size, other.etag, other.last_modified, other.digest or self.digest, other.place)
        return told == (self.size, self.etag, self.last_modified, self.digest or other.digest, self.place)

    def compare(self, shown: Identity) -> Verdict:
        """Decide whether a source that reports `shown` serves the version that self describes.

        A digest outranks a strong tag, which outranks a date (RFC 9110, section 8.8.1). Weak tags that differ prove a
        change, but equal ones prove nothing. If `shown` lacks a tag or a date that self has, the version is in doubt:
        the file may have been replaced by one that has none.
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
        dated = self.last_modified is not None and not self.last_modified.startswith(LAYOUTS)
        return Verdict(Sameness.SAME if dated and not elsewhere else Sameness.PRESUMED)

    def _difference(self, shown: Identity) -> str:
        if self.etag and shown.etag and self.etag.startswith(WEAK) == shown.etag.startswith(WEAK):
            difference = _difference("ETag", self.etag, shown.etag)
            if difference or self.strong_etag:
                return difference
        if self.last_modified and shown.last_modified:
            if self.last_modified.startswith(LAYOUTS) and shown.last_modified.endswith(f" of {self.last_modified}"):
                return ""  # of the same image file, whose date was not told or did not count before
            return _difference("Last-Modified", self.last_modified, shown.last_modified)
        return ""

    def _lost(self, shown: Identity) -> str:
        """Which validator self has and `shown` lacks, in words; "" if none."""
        if self.etag and (shown.etag is None or self.etag.startswith(WEAK) != shown.etag.startswith(WEAK)):
            return f"ETag was {self.etag}, is now {shown.etag or 'not told'}"
        if self.last_modified and not shown.last_modified:
            return f"Last-Modified was {self.last_modified}, is now not told"
        return ""

    def joined(self, other: Identity) -> Identity:
        """Self, completed with what only `other` (the same version) reports; self itself if that is nothing."""
        etag, last_modified = self.etag or other.etag, self.last_modified or other.last_modified
        digest = self.digest or other.digest
        if (etag, last_modified, digest) == (self.etag, self.last_modified, self.digest):
            return self
        return dataclasses.replace(self, etag=etag, last_modified=last_modified, digest=digest)


def layout_mark(kind: str, file_size: int, stamp: str) -> str:
    """What stands for the version of an image file ("qcow2" or "QED") if its server does not send a date.

    `stamp`: a digest of its header and L1 table.
    """
    return f"{kind} file of {file_size} bytes, tables {stamp}"


def _difference(what: str, old: str, new: str) -> str:
    return "" if old == new else f"{what} was {old}, is now {new}"


@dataclasses.dataclass(frozen=True, slots=True)
class Extent:
    """A range of the source. `zero`: it reads as zeros, so it need not be transferred."""

    pos: int
    size: int
    zero: bool


class Source(Protocol):
    """The bytes of a backing image. All sizes and positions are in bytes.

    Many tasks may call `read` and `extents` at the same time. A range outside `identity.size` is a ValueError: the
    caller's mistake. Every source passes `tests/source/test_source_contract.py`, which tests this protocol.
    """

    @property
    def identity(self) -> Identity:
        """The version that this source serves. Replaced when an answer reveals more about it (`Identity.joined`)."""
        ...

    @property
    def received(self) -> int:
        """Bytes of payload received so far. Includes those of unfinished reads, if the source knows them.

        For measuring the rate: on a shared link, reads that started together also end together. A count of finished
        reads would grow in bursts.
        """
        ...

    async def read(self, pos: int, buffer: memoryview, *, urgent: bool = False) -> int | None:
        """Fill `buffer`, any contiguous view, with the bytes at `pos`.

        Returns how many bytes were transferred for that, if these are not just those of the buffer; otherwise None.

        `urgent` reads, for which a reader waits, do not queue behind the others. Cancelling is safe: the source drops
        the connection or discards the reply, and does not touch `buffer` after the call has ended.

        Raises:
            SourceUnreachable: a retry may succeed. The failed connection has been dropped.
            SourceChanged: the answer is of another version than `identity`.
            SourceError: permanent.
        """
        ...

    async def extents(self, pos: int, size: int) -> Sequence[Extent] | None:
        """Which parts of the range read as zeros, or None if the source cannot tell.

        The extents are in order and without gaps. They start at `pos` and cover at least one byte, but may end before
        `pos + size`, because a server may describe less than it was asked for. Raises what `read` raises.
        """
        ...

    async def aclose(self) -> None:
        """Drop all connections. Reads in flight and later ones raise SourceUnreachable. A second call does nothing."""
        ...


def check_range(pos: int, size: int, whole: int) -> None:
    """Raise ValueError unless the range lies inside a source of `whole` bytes."""
    if pos < 0 or size < 0 or pos + size > whole:
        raise ValueError(f"{pos}+{size} is not inside the {whole} bytes of the source")


@runtime_checkable
class KnowsZeros(Protocol):
    """The optional interface of a source that has allocation tables in memory, and so knows zeros without a request."""

    def zeros_now(self, pos: int, size: int) -> bool:
        """Whether the range is known to read as zeros. False may mean unknown."""
        ...


@runtime_checkable
class HasFile(Protocol):
    """The optional interface of a source that decodes a disk image format. The encoded file is a source, too."""

    @property
    def file(self) -> Source:
        """The file. Samples (`samples.py`) are taken of it."""
        ...


@runtime_checkable
class Gathers(Protocol):
    """The optional interface of a source that can leave arriving bytes in the kernel for a moment."""

    def gather(self, seconds: float) -> None:
        """From now on, let the bytes of reads that are not urgent gather for that long before they are received.

        One receive of many bytes costs less than many receives of few. 0: receive them as they come, which also ends
        the current wait. Must not be longer than the bytes of that time fit into the sockets' buffers.
        """
        ...
