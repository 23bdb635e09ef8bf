"""The port behind which missing bytes come from: what a source is, and nothing of how it is reached.

Owns `Source`, `KnowsZeros`, `Identity`, `Extent`. Must not know overlays, clusters or who asks. A source judges every
answer before it hands a byte on: when `read` returns, the caller's buffer holds exactly the bytes asked for, of the
version that `identity` names; when it raises, the buffer's content is undefined and must not be used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol, runtime_checkable


@dataclasses.dataclass(frozen=True, slots=True)
class Identity:
    """Which version of which thing a source serves.

    `size` in bytes. `etag` is a strong HTTP validator or None (weak ones are dropped); `last_modified` is the
    HTTP date as the server sent it, or None. `name` is the redacted URL after redirects, for humans only: two
    mirrors of one version have different names and are the same version.
    """

    size: int
    etag: str | None = None
    last_modified: str | None = None
    name: str = ""

    def difference(self, other: Identity) -> str | None:
        """Say in a few words how `other` is another version than self, or None if it may be the same.

        A validator that only one side has proves nothing and is not compared; the strong ETag outranks the date
        (RFC 9110, section 8.8.1).
        """
        if self.size != other.size:
            return f"size was {self.size}, is now {other.size}"
        if self.etag is not None and other.etag is not None:
            return None if self.etag == other.etag else f"ETag was {self.etag}, is now {other.etag}"
        dated = self.last_modified is not None and other.last_modified is not None
        if dated and self.last_modified != other.last_modified:
            return f"Last-Modified was {self.last_modified}, is now {other.last_modified}"
        return None

    def joined(self, other: Identity) -> Identity:
        """Self with the validators that only `other` has, which may be the same version; self if there are none."""
        etag, last_modified = self.etag or other.etag, self.last_modified or other.last_modified
        if (etag, last_modified) == (self.etag, self.last_modified):
            return self
        return dataclasses.replace(self, etag=etag, last_modified=last_modified)


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
