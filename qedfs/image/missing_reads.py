"""Reads the missing bytes of one image from its source, for a reader or for the rest of a partial write.

Owns the attempts of a read: it is run again if the image gets another source meanwhile. Must not know where the bytes
go, nor who keeps them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qedfs.errors import QedfsError, SourceUnreachable
from qedfs.image.condition import Cause
from qedfs.image.waiting_reads import WaitingRead, WaitingReads

if TYPE_CHECKING:
    from qedfs.image.image import Image


class MissingReads:
    """The reads of missing bytes of one image."""

    def __init__(self, image: Image) -> None:
        self.waiting = WaitingReads()
        self._image = image

    async def fill(self, pieces: Sequence[tuple[int, memoryview]], began: float) -> bool:
        """Fill each view with the image's bytes at its position, from the source, and with zeros past the source's end.

        `began`: when the request came. Returns False if the source has failed, and the clusters are to be looked up
        again: the request was stalled and may try again now, or the source is no longer needed. In the latter case the
        stream has finished meanwhile, and the user may have deleted the source.
        """
        image = self._image
        with self.waiting.waiting(began) as read:
            while True:
                if image.complete:
                    return False
                if (changed := image.changed) is not None:
                    raise changed.fresh()
                source, answered = image.exchanges, False
                try:
                    with read.attempt(image.stalls.most_seconds):
                        await self._ask(pieces)
                        answered = True
                except QedfsError as exc:
                    if source == image.exchanges:
                        answered = await self._despite(exc, pieces, read)
                        if not (answered or read.ended):
                            return False
                if read.ended:
                    raise SourceUnreachable(f"{image.name}: {read.ended}")
                # After an exchange, the old source's bytes must not be answered, and its errors mean nothing.
                if answered and source == image.exchanges:
                    return True

    async def _despite(self, error: QedfsError, pieces: Sequence[tuple[int, memoryview]], read: WaitingRead) -> bool:
        """What to do after an error of the source: returns whether the pieces are filled all the same.

        Returns False if it makes sense to look the clusters up again. Raises the error otherwise.
        """
        image, source = self._image, self._image.exchanges
        if not image.complete:
            if await self._rescued(pieces, read):
                return True
            # Look again before a wait: nothing would end it if the image needs no source any more.
            if not image.complete and source == image.exchanges and not read.ended:
                await self._outlast(error, read)
        return False

    async def _rescued(self, pieces: Sequence[tuple[int, memoryview]], read: WaitingRead) -> bool:
        """Whether another copy of the source has answered."""
        answered = False
        with contextlib.suppress(QedfsError), read.attempt(self._image.stalls.most_seconds):
            if self._image.rescue is not None and self._image.standby is None:
                await self._image.rescue.read(pieces)
                answered = True
        return answered

    async def _outlast(self, error: QedfsError, read: WaitingRead) -> None:
        """Wait until the read should be tried again after this error; raise it if the read should not."""
        image = self._image
        if image.standby is not None or image.fetch is None or not image.stalls.outlasts(error):
            image.failed(error)
            raise error
        image.condition.note(Cause.FETCH_FAILED, error)  # not counted as a failure of the stream
        with read.attempt(image.stalls.most_seconds):
            await image.stalls.stall(error, image.fetch.comeback)

    async def _ask(self, pieces: Sequence[tuple[int, memoryview]]) -> None:
        """One attempt of `fill`."""
        image = self._image
        if image.standby is not None:
            image.counters.missed += sum(len(view) for _, view in pieces)
            await image.standby.read(pieces)
            image.condition.clear(Cause.FETCH_FAILED)
            return
        fetch, version = image.fetch, image.version
        assert fetch is not None  # noqa: S101 - for the type checker; callers have checked
        assert version is not None  # noqa: S101 - likewise
        if version.identity is not None and pieces[0][0] >= version.identity.size:
            return  # all of it is past the source's end
        async with fetch.waiting():
            source_size = (await version.check()).size
            inside = [(pos, view) for pos, view in pieces if pos < source_size]
            for pos, view in inside:
                image.counters.missed += len(view)
                image.waits.note(pos, len(view))
            if inside:
                await fetch.read(inside, consumer=image.consumer if image.copy_on_read and image.gate is None else None)
                await version.check()
        image.condition.clear(Cause.FETCH_FAILED)
