"""The condition of one image: what is wrong. Each trouble has a cause, an error, a start and a remedy.

Owns the list of troubles and their order. Must not know who reads it, nor what anybody does about a trouble.

The code that owns a cause notes it and clears it. So bytes from the source clear FETCH_FAILED and nothing else. The
overlay must not import this room, so it cannot note anything here. It keeps its errors itself, and `look` reads them.
"""

from __future__ import annotations

import dataclasses
import enum
import time
from collections.abc import Iterable

from qedfs.errors import NoSpace, QedfsError
from qedfs.overlay.overlay import Overlay


class Cause(enum.StrEnum):
    """What is wrong. The most lasting causes come first, which is also the order in which troubles are reported."""

    NOT_SERVED = "not-served"  # the overlay could not be opened, so there is no image
    DAMAGED = "damaged"  # the overlay was truncated or overwritten
    REPLACED = "replaced"  # the overlay's path leads to another file now
    BARRIER_FAILED = "barrier-failed"  # the overlay is read-only, and shows what is on the disk
    INTERNAL_ERROR = "internal-error"  # a bug has ended the tasks of the image
    NO_SPACE = "no-space"  # there is no space for fetched clusters
    FULL_AT_OPENING = "full-at-opening"  # the overlay's file system has been full since the overlay was opened
    COMMIT_FAILED = "commit-failed"  # the overlay's tables could not be written; the entries wait in memory
    SOURCE_CHANGED = "source-changed"  # the source serves another version than that of the overlay's clusters
    JOB_STOPPED = "job-stopped"  # an error has stopped the background job of the image
    NOT_KEPT = "not-kept"  # fetched clusters could not be written to the overlay
    SOURCE_AWAY = "source-away"  # requests to the source get no answer
    FETCH_FAILED = "fetch-failed"  # the last read of missing bytes, or the stream, has failed


_ORDER = {cause: number for number, cause in enumerate(Cause)}
_SPACE = "free space on the overlay's file system"
_ENDS_WITH = {
    Cause.NOT_SERVED: "the repair of the file, or its release by another user; the mount checks once a second",
    Cause.DAMAGED: "the end of the mount and qedfs check",
    Cause.REPLACED: "the end of the mount",
    Cause.BARRIER_FAILED: "the next mount of the overlay",
    Cause.INTERNAL_ERROR: "the next mount of the overlay",
    Cause.NO_SPACE: _SPACE,
    Cause.FULL_AT_OPENING: _SPACE,
    Cause.COMMIT_FAILED: "the next commit that succeeds; the mount tries every two seconds",
    Cause.SOURCE_CHANGED: "the next mount, with the old version again or with a new overlay",
    Cause.JOB_STOPPED: "qedfs stream start",
    Cause.NOT_KEPT: "the next fetched cluster that can be written",
    Cause.SOURCE_AWAY: "the next answer of the source",
    Cause.FETCH_FAILED: "the next fetch that succeeds",
}
# Causes that a complete image cannot have, because it needs no source and nothing is fetched for it.
_OF_INCOMPLETE = frozenset(
    {
        Cause.NO_SPACE,
        Cause.SOURCE_CHANGED,
        Cause.JOB_STOPPED,
        Cause.NOT_KEPT,
        Cause.SOURCE_AWAY,
        Cause.FETCH_FAILED,
    }
)


@dataclasses.dataclass(frozen=True, slots=True)
class Trouble:
    """One thing that is wrong. Raise `error.fresh()`, not `error`, which stays stored here."""

    cause: Cause
    error: QedfsError
    since: float  # seconds since 1970, of the first error of this cause since the last success

    @property
    def ends_with(self) -> str:
        """What ends it, for people."""
        full = self.cause is Cause.COMMIT_FAILED and isinstance(self.error, NoSpace)
        return _SPACE if full else _ENDS_WITH[self.cause]


class Condition:
    """The troubles of one image."""

    def __init__(self, overlay: Overlay) -> None:
        self._overlay = overlay
        self._troubles: dict[Cause, Trouble] = {}

    def follow(self, overlay: Overlay) -> None:
        """Read the errors of this overlay from now on."""
        self._overlay = overlay

    def note(self, cause: Cause, error: QedfsError, *, since: float | None = None) -> None:
        """Record that something is wrong, or still is. Stores the error without its traceback.

        `since`: when it began, in seconds since 1970; None if it is noted as it begins.
        """
        known = self._troubles.get(cause)
        if since is None:
            since = time.time() if known is None else known.since
        self._troubles[cause] = Trouble(cause, error.fresh(), since)

    def clear(self, cause: Cause) -> None:
        """Record that a trouble is over, if there was one."""
        self._troubles.pop(cause, None)

    def noted(self, cause: Cause) -> QedfsError | None:
        """The noted error of a cause, or None."""
        known = self._troubles.get(cause)
        return None if known is None else known.error

    def first(self, *causes: Cause) -> QedfsError | None:
        """The error of the most lasting of these causes, or None."""
        self.look()
        found = self._in_order(cause for cause in causes if cause in self._troubles)
        return found[0].error if found else None

    def troubles(self) -> list[Trouble]:
        """All troubles, the most lasting first."""
        self.look()
        over = _OF_INCOMPLETE if self._overlay.backing is None else frozenset[Cause]()
        return self._in_order(self._troubles.keys() - over)

    @property
    def worst(self) -> Trouble | None:
        """The most lasting trouble; None if all is well."""
        return next(iter(self.troubles()), None)

    def _in_order(self, causes: Iterable[Cause]) -> list[Trouble]:
        return [self._troubles[cause] for cause in sorted(causes, key=_ORDER.__getitem__)]

    def look(self) -> None:
        """Read the overlay's own errors. Call this regularly, so that `since` is approximately right."""
        overlay = self._overlay
        for cause, error in (
            (Cause.DAMAGED, overlay.damage),
            (Cause.BARRIER_FAILED, overlay.failure),
            (Cause.FULL_AT_OPENING, overlay.full),
            (Cause.COMMIT_FAILED, overlay.commit_error),
        ):
            if error is None:
                self.clear(cause)
            else:
                self.note(cause, error)
