"""What an image does with the bytes that its fetch queue brings: they are adopted, if they are of the right version.

Owns the adoptions under way, the pause after a full disk, and what follows if an adoption fails. Must not know
requests or flights (`fetch/queue.py`), nor how clusters are stored (`overlay/adoption.py`).

Bytes arrive in tasks of the fetch queue, several at a time.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import trio

from qedfs.errors import NoSpace, QedfsError, SourceError
from qedfs.image.condition import Cause

if TYPE_CHECKING:
    from qedfs.image.image import Image

log = logging.getLogger(__name__)

NO_SPACE_RETRY_SECONDS = 5.0


class ImageConsumer:
    """The `Consumer` of one image."""

    def __init__(self, image: Image) -> None:
        self.limiter = image.limiter
        self._image = image
        self._full_at = float("-inf")  # when an adoption or a commit found no space
        self._adopting = 0  # running adoptions
        self._adopted = trio.Event()  # set when the last of them has ended

    def wants(self, pos: int, size: int) -> bool:
        """Whether to adopt bytes fetched for another image. This one must be streaming and know the version."""
        image = self._image
        known = image.version is not None and image.version.identity is not None
        return image.streaming and known and pos < image.size

    def lacks(self, pos: int, size: int) -> int:
        """How many bytes of this range are in missing clusters."""
        image = self._image
        return image.overlay.count_missing_in(pos, min(size, image.size - pos)) if pos < image.size else 0

    async def take(self, pos: int, buffer: bytearray, size: int, *, asked: bool) -> None:
        """Adopt fetched bytes, see `Overlay.adopt`. Errors are recorded, not raised: the reader has its bytes."""
        image = self._image
        if image.changed is not None or image.closed or pos >= image.size or self._too_full():
            return
        with self.adopting():
            await self._keep(pos, buffer, min(size, image.size - pos), asked=asked)

    @contextlib.contextmanager
    def adopting(self) -> Iterator[None]:
        """The context of an adoption, for whose end `adoptions_ended` waits."""
        self._adopting += 1
        try:
            yield
        finally:
            self._adopting -= 1
            if not self._adopting:
                self._adopted.set()

    async def adoptions_ended(self) -> None:
        """Wait until nothing is being adopted any more."""
        if self._adopting:
            # A thread may be writing to the overlay. If we closed it now, its clusters would be lost and leak.
            self._adopted = trio.Event()
            await self._adopted.wait()

    async def _is_current(self) -> bool:
        """Whether fetched bytes are of the right version, and of the source that the image has after the check."""
        image = self._image
        source = image.exchanges
        try:
            if image.version is not None:
                await image.version.check()  # again, because the answer may have revealed more about the version
        except QedfsError:
            if source == image.exchanges:
                raise
        return source == image.exchanges

    async def _keep(self, pos: int, buffer: bytearray, size: int, *, asked: bool) -> None:
        image = self._image
        try:
            if not await self._is_current():
                return
            image.condition.clear(Cause.FETCH_FAILED)
            kept = await image.overlay.adopt(pos, buffer, size, cold=not asked)
        except NoSpace as exc:
            self.met_full_disk()
            image.note(Cause.NO_SPACE, exc)
            return
        except SourceError as exc:
            image.failed(exc)
            return
        except Exception as exc:
            if not isinstance(exc, QedfsError):
                # A bug. Record it for the stream, which would otherwise request these clusters again at once.
                log.exception("%s: cannot keep what was fetched", image.name)
                exc = QedfsError("internal error, see the log")
            image.note(Cause.NOT_KEPT, exc)
            return
        if kept:  # 0 if guests have written all of the clusters first, which says nothing about free space
            self._full_at = float("-inf")
            image.condition.clear(Cause.NO_SPACE)
            image.condition.clear(Cause.NOT_KEPT)
        if asked:
            image.counters.kept_asked += kept
        else:
            image.counters.kept_stream += kept
        await image.commits.after_adoption()

    def lost(self, error: QedfsError) -> None:
        """Record that a flight for this image has failed."""
        if not self._image.complete:
            self._image.failed(error)

    # A full disk.

    def _too_full(self) -> bool:
        if trio.current_time() - self._full_at >= NO_SPACE_RETRY_SECONDS:
            return False
        # A commit that finds space clears both errors. The stream then fetches again, and those bytes must be stored.
        return self._image.full is not None or isinstance(self._image.overlay.commit_error, NoSpace)

    def met_full_disk(self) -> None:
        """Store nothing that is fetched for NO_SPACE_RETRY_SECONDS."""
        self._full_at = trio.current_time()

    def try_again(self) -> None:
        """Try to store the next fetched bytes, even if the disk was full a moment ago."""
        self._full_at = float("-inf")
