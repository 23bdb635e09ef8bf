"""When an image commits: after so much new data, after so much time, and at once if adoption runs ahead of the disk.

Owns these bounds, and what follows if a commit fails: the failure is counted, and logged once. Must not know what a
commit writes (`overlay/commit.py`), nor who asks for durability (`Image.flush`).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from qedfs.errors import NoSpace, QedfsError

if TYPE_CHECKING:
    from qedfs.image.image import Image

log = logging.getLogger(__name__)

COMMIT_BYTES = 64 << 20  # commit after this much new data: 16 barriers per GiB
# A power cut may lose writes that were not flushed. This bounds their age (ext4's own commit interval is 5 s).
COMMIT_SECONDS = 2.0
MOST_UNCOMMITTED_BYTES = 256 << 20  # above this, adoption waits for a commit


class CommitSchedule:
    """The commits of one image that no guest has asked for."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self.running = False
        self._logged_error = ""  # the error of the last failed commit, to log it only once

    def soon(self) -> None:
        """Begin a commit if enough has been written since the last one. Call this after each write."""
        if self._image.overlay.uncommitted_bytes >= COMMIT_BYTES and not self.running and self._image.fetch is not None:
            self._image.fetch.nursery.start_soon(self.commit)
            self.running = True

    async def after_adoption(self) -> None:
        """As `soon`, but wait for the commit if too much is uncommitted. Call this after each adoption."""
        overlay = self._image.overlay
        if overlay.uncommitted_bytes >= MOST_UNCOMMITTED_BYTES or overlay.crowded:
            await self.commit()
        else:
            self.soon()

    async def commit(self) -> None:
        """Commit. Errors are recorded, not raised: the entries stay for the next commit. A flush raises its own."""
        image = self._image
        self.running = True
        try:
            await image.overlay.commit()
        except NoSpace:
            image.consumer.met_full_disk()
            image.failures += 1
        except Exception as exc:
            if not isinstance(exc, QedfsError):
                # A bug must affect this image only, not every image of the mount.
                log.exception("%s: cannot commit", image.name)
                exc = QedfsError("internal error, see the log")
            if self._logged_error != str(exc):
                log.error("%s: %s", image.name, exc)
                self._logged_error = str(exc)
            image.failures += 1
        else:
            self._logged_error = ""
        finally:
            self.running = False
