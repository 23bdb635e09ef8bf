"""The state of an open overlay, as others may ask for it: sizes, counters, what is missing, and what is wrong.

Owns these answers, which the status, the metrics and the jobs ask for. Nothing here waits, reads clusters or changes
anything. Must not know how the overlay is read and written (`overlay.py`).
"""

from __future__ import annotations

import os

from qedfs.errors import BadOverlay, NoSpace, QedfsError, ReadOnlyOverlay
from qedfs.format.record import Record
from qedfs.overlay.parts import Parts


class OverlayState:
    """The state of one overlay."""

    def __init__(self, parts: Parts, *, backing: str | None, journal_remark: str, found_mark: str) -> None:
        """`backing`: None if the overlay has none.

        `journal_remark`: what to tell the user about writes of a killed session that are not served. `found_mark`: the
        mark of the overlay when it was opened (`Session.mark`).
        """
        self.storage = parts.storage
        self.geometry = parts.clusters.geometry
        self.clusters = parts.clusters
        self.tables = parts.tables
        self.committer = parts.committer
        self.backing = backing
        self.journal_remark = journal_remark
        self.found_mark = found_mark
        self.times = parts.session.times  # of the image
        self._session = parts.session
        self._barriers = parts.barriers
        self._freed = parts.freed

    @property
    def image_size(self) -> int:
        """Bytes of the image."""
        return self.geometry.image_size

    @property
    def cluster_size(self) -> int:
        """Bytes of a cluster."""
        return self.geometry.cluster_size

    @property
    def record(self) -> Record:
        """The private record, including changes that are not stored yet."""
        return self._session.record

    def mark(self) -> str:
        """See `Session.mark`."""
        return self._session.mark()

    def marks(self) -> tuple[str, ...]:
        """What `found_mark` can begin with at the next opening, if nobody else writes to the overlay until then."""
        return self._session.marks()

    @property
    def probes_backing(self) -> bool:
        """Whether the format of the backing is not recorded (QEMU would probe its first bytes)."""
        return self.backing is not None and not self._session.names_format

    @property
    def epoch(self) -> int:
        """Changes when a failed barrier takes entries back. Then the runs of an earlier `map` may be invalid."""
        return self.clusters.epoch

    @property
    def discards(self) -> int:
        """Changes when data is discarded. Then the data runs of an earlier `map` may be out of date."""
        return self._freed.discards

    @property
    def discarded(self) -> int:
        """How many missing clusters were discarded."""
        return self.clusters.discarded

    @property
    def writable(self) -> bool:
        """Whether the overlay takes writes and adoptions."""
        return self._barriers.writable

    @property
    def damage(self) -> BadOverlay | None:
        """Set if the overlay was truncated or overwritten, before or after the opening. Then it is never complete."""
        return self.storage.damage or self.clusters.missing_count.damage

    @property
    def full(self) -> NoSpace | None:
        """Why the session has not started: the disk has been full since the opening. None if it has started."""
        return self._session.full

    @property
    def failure(self) -> ReadOnlyOverlay | None:
        """Set if a barrier has failed. The overlay then takes no writes until it is opened again."""
        return self._barriers.failure

    @property
    def missing(self) -> int | None:
        """How many clusters are missing; None until they have been counted, and after a failed barrier."""
        return self.clusters.missing_count.total

    @property
    def commit_pending(self) -> bool:
        """Whether there are entries that the file does not have yet."""
        return self.committer.pending

    @property
    def uncommitted_bytes(self) -> int:
        """Bytes of data whose entries are not committed yet."""
        return self.committer.uncommitted_bytes

    @property
    def crowded(self) -> bool:
        """Whether uncommitted entries take more memory than they should."""
        return self.tables.crowded

    @property
    def barriers(self) -> int:
        """How many barriers there have been since the overlay was opened."""
        return self._barriers.count

    @property
    def barrier_seconds(self) -> float:
        """Time spent in barriers."""
        return self._barriers.seconds

    @property
    def file_size(self) -> int:
        """Length of the overlay file."""
        return self.storage.size()

    @property
    def disk_usage(self) -> int:
        """Bytes that the overlay file takes on disk. Only for display, so it raises nothing."""
        return self.storage.disk_usage()

    def file_status(self) -> os.stat_result:
        """The attributes of the overlay file."""
        return self.storage.stat()

    @property
    def commit_error(self) -> QedfsError | None:
        """Why entries are not in the file yet: the last commit has failed. Otherwise None."""
        return self.committer.error

    @property
    def has_space_to_give_back(self) -> bool:
        """Whether `give_space_back` may have something to do."""
        return self._freed.any and self.writable

    @property
    def seems_unchanged(self) -> bool:
        """Whether nobody, this process included, has changed the file since `inspect` found it in order. One fstat."""
        return self._session.seems_unchanged
