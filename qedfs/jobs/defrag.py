"""The defragmentation job: lays the data of an overlay out in the order of the image.

Owns what is moved, in which order and how fast. How a cluster is moved, without a loss, is in `overlay/relocation.py`.
Must not know who controls it.

An overlay that readers have filled has its clusters in the order in which they were asked for. Reading the image from
start to end then jumps about in the file. The job walks the image in stretches. It moves one whose data is in more
than one piece to the end of the file, in one piece. When it has passed the whole image, the first places are free, and
what earlier sessions have leaked is found. It moves the stretches there, as far as they fit, and what is left free at
the end of the file is cut off.

Room: what was moved and not committed yet is on the disk twice. That is up to COMMIT_BYTES, as a commit follows then,
and the old places are given back to the file system. If there is much free space, they are given back later, in longer
rows (`Relocation.put_off_punches`). A file system that cannot punch holes needs room for all that is moved.

While guests read or write, one piece is moved per GUEST_SECONDS. A request that comes meanwhile waits for it, so some
two in a thousand do. To punch one cluster after the other would delay more of them, because that thread takes a
processor, and the interpreter's lock twice for each: 500 of 1,100 slow reads waited for it, 310 for a move.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from typing import ClassVar, Unpack

import trio

from qedfs.errors import BadOverlay, NoSpace
from qedfs.image.commit_schedule import COMMIT_BYTES
from qedfs.image.image import Image
from qedfs.jobs.job import Job, JobOptions
from qedfs.overlay.overlay import Overlay
from qedfs.overlay.relocation import Gathering
from qedfs.units import format_size

log = logging.getLogger(__name__)

STRETCH_BYTES = 8 << 20  # of the image. A disk with heads reads as much in the time of some seeks.
GUEST_SECONDS = 0.02
PACE_SECONDS = 0.25
STILL_SECONDS = 10.0  # a job that has been held off for so long no longer has punches put off
LOOKED_AT = 64  # stretches without anything to do, before other tasks get their turn


@dataclasses.dataclass(frozen=True, slots=True)
class Disorder:
    """How far an overlay is from the order of its image, in bytes and pieces of its file.

    `to_move`: the data of all stretches that are in more than one piece. A job moves most of it twice.
    """

    data: int
    pieces: int
    longest_piece: int
    to_move: int


async def disorder(overlay: Overlay) -> Disorder:
    """Look at all tables, and change nothing. Raises BadOverlay for an invalid one."""
    found = await overlay.fragments()
    clusters, stretch, cluster, scattered = overlay.geometry.clusters, _stretch_of(overlay), 0, 0
    while cluster < clusters and overlay.relocation.most_clusters:
        if gap := await overlay.gap(cluster):
            cluster += gap
            continue
        count = min(stretch - cluster % stretch, clusters - cluster)
        layout = await overlay.relocation.layout(cluster, count)
        scattered += layout.clusters if layout.pieces > 1 else 0
        cluster += count
        await trio.lowlevel.checkpoint()
    return Disorder(found.data, found.pieces, found.longest, scattered * overlay.cluster_size)


def _stretch_of(overlay: Overlay) -> int:
    """Clusters of one stretch."""
    return max(1, STRETCH_BYTES // overlay.cluster_size)


class DefragJob(Job):
    """The defragmentation of one image. It exists from a command until it has ended."""

    kind: ClassVar[str] = "defrag"

    def __init__(self, image: Image, **options: Unpack[JobOptions]) -> None:
        """See `Job`."""
        super().__init__(image, **options)
        self.moved_bytes = 0  # in all
        self._clusters = image.overlay.geometry.clusters
        self._stretch = _stretch_of(image.overlay)
        self._lowered = 0  # the first cluster that the second pass has not looked at
        self._no_room = False  # whether the disk has been full, whatever free space it tells
        self._still_since: float | None = None  # while the job does not work

    @property
    def progress(self) -> int:
        """How far it is in the image, in bytes: half of it when all has been moved once."""
        if self.finished or not self._clusters:
            return self.image.size
        return int(self.image.size * (self.cursor + self._lowered) / (2 * self._clusters))

    async def work(self) -> bool:
        """Move what is not in order; see `Job.work`. A full disk ends the job: it is no reason to wait for room."""
        relocation = self.image.overlay.relocation
        self._still_since = None
        if not relocation.most_clusters:
            self.cursor = self._lowered = self._clusters  # such clusters are longer than any jump
        try:
            while self.cursor < self._clusters:
                if not self._goes_on():
                    return False
                await self._gather()
            relocation.punch_again()
            relocation.find_leaks()
            await self.image.overlay.commit_and_give_back()
            while self._lowered < self._clusters:
                if not self._goes_on():
                    return False
                await self._lower()
        except NoSpace as exc:
            if relocation.put_off_bytes:
                # Not put off again: a user's quota is no part of what the file system tells of its free space. It could
                # be too small for a stretch, and the job would move the first clusters of that again and again.
                self._no_room = True
                relocation.punch_again()
                with contextlib.suppress(NoSpace):
                    await self.image.overlay.commit_and_give_back()
                return False  # and begin again
            room = format_size(2 * COMMIT_BYTES)
            self.fail(NoSpace(f"{exc}; what is in order stays so, and the rest needs {room} of free space"))
            return False
        return True

    def stand_still(self) -> None:
        """Let old places be punched at once, unless it goes on soon by itself.

        While it is held off, as outside its hours, nobody looks at the free space, which others may use up.
        """
        now = trio.current_time()
        self._still_since = now if self._still_since is None else self._still_since
        if not self.allowed or now - self._still_since >= STILL_SECONDS:
            self.image.overlay.relocation.punch_again()

    async def finish(self) -> None:
        """Make all of it durable, and give the old places back."""
        await self.image.overlay.commit_and_give_back()
        log.info("%s: laid out in order, %s were moved", self.image.name, format_size(self.moved_bytes))

    def _goes_on(self) -> bool:
        if problem := self.image.overlay.relocation.problem:
            raise BadOverlay(f"{self.image.name}: {problem}; run qedfs check")
        return self.allowed and not self.hold_off()

    async def _gather(self) -> None:
        """Put the next stretch in one piece."""
        overlay, first = self.image.overlay, self.cursor
        if gap := await overlay.gap(first):
            self.cursor = min(self._clusters, first + gap)
            await trio.lowlevel.checkpoint()
            return
        count = min(self._stretch - first % self._stretch, self._clusters - first)
        if (await overlay.relocation.layout(first, count)).pieces > 1:
            if not self._no_room:
                await overlay.relocation.put_off_punches()
            gathering = await overlay.relocation.gather(first, count)
            if gathering is not None and not await self._move(gathering):
                # The rest follows. A job that is held off again and again would never end if it began anew.
                count = gathering.next - first
        elif first // self._stretch % LOOKED_AT == 0:
            await trio.lowlevel.checkpoint()
        self.cursor = first + count

    async def _lower(self) -> None:
        """Move the next stretch to a lower place, if there is one that is large enough.

        Also one that this job has not moved: an earlier one may have been killed after its first pass.
        """
        overlay, first = self.image.overlay, self._lowered
        if gap := await overlay.gap(first):
            self._lowered = min(self._clusters, first + gap)
            await trio.lowlevel.checkpoint()
            return
        end = first + min(self._stretch - first % self._stretch, self._clusters - first)
        layout = await overlay.relocation.layout(first, end - first)
        gathering = await overlay.relocation.lower(first, end - first, layout.first) if layout.clusters else None
        if gathering is not None and not await self._move(gathering):
            end = gathering.next  # the rest follows
        self._lowered = end
        await trio.lowlevel.checkpoint()

    async def _move(self, gathering: Gathering) -> bool:
        """Move a stretch, piece by piece, as fast as the rules allow. Returns whether it came to its end."""
        with gathering:
            while not gathering.ended:
                if due := self.rate_limiter.due():
                    await self.sleep(min(due, PACE_SECONDS))
                elif self.guests_were_active():
                    await self.sleep(GUEST_SECONDS)
                if not self._goes_on():
                    return False
                if self.rate_limiter.due():
                    continue
                moved = await gathering.step(self.rate_limiter.piece_bytes)
                self.rate_limiter.sent(moved)
                self.moved_bytes += moved
                await trio.lowlevel.checkpoint()
        if self.hindered:
            self.makes_progress()
        if self.image.overlay.uncommitted_bytes >= COMMIT_BYTES:
            await self.image.overlay.commit_and_give_back()
        return True
