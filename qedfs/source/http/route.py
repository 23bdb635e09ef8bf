"""The current redirect target of a source. Decides when to ask the origin for a new one.

Owns the rules for giving up a redirect target. A mirror may die, or a signed link expire, and the origin (the URL that
the user named) then usually redirects elsewhere. Must not know how the origin is asked. Pure; times are seconds of the
caller's clock.

The first failure is retried at the same target, because most failures concern one connection only. If the failure
persists, the origin is asked again. If that does not help, it is not asked again until one deadline has passed: a
dead mirror with a thousand readers must not cause a thousand requests to the origin.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator

from qedfs.errors import QedfsError, Reason, SourceChanged, SourceError, SourceUnreachable
from qedfs.source.http.target import Target

# Failures within this time count as one, however many readers they hit. Shorter than the pause before the first retry.
MOMENT_SECONDS = 0.03
SILENT_DEADLINES = 1 / 3  # how long, in deadlines, a target may leave a request unanswered before the origin is asked


@dataclasses.dataclass(frozen=True, slots=True)
class Route:
    """A target with its request headers, built once per resolution so that requests need no string processing.

    `redirected`: the target is not the origin itself.
    """

    target: Target
    lines: tuple[str, ...] = dataclasses.field(repr=False)
    cookies: tuple[bytes, ...] = dataclasses.field(repr=False)
    where: str
    redirected: bool
    conditional: bool = True  # the requests have the version as a condition


class RouteHealth:
    """The recent failures of the current target."""

    def __init__(self, deadline_seconds: float) -> None:
        self._deadline_seconds = deadline_seconds
        self._failing_since = math.inf  # time of the first failure since the last successful read
        self._asked_at = -math.inf  # when the origin was last asked, unless a read has succeeded since then
        self._origin_failure = ""  # why that gave no new target

    def succeeded(self) -> None:
        """Record a successful read."""
        self._failing_since = math.inf
        self._asked_at = -math.inf
        self._origin_failure = ""

    def asked(self, now: float) -> None:
        """Record that the origin is being asked."""
        self._asked_at = now
        self._origin_failure = ""

    def failed(self, error: SourceError, asked: QedfsError | None = None) -> SourceUnreachable:
        """The target's error as a transient one. `asked`: why asking the origin for another target has failed."""
        if asked is not None:
            self._origin_failure = f"; asked again, {asked}"
        reason = error.reason if isinstance(error, SourceUnreachable) else Reason.SERVER
        wish = error.retry_after_seconds if isinstance(error, SourceUnreachable) else None
        return SourceUnreachable(f"{error}{self._origin_failure}", reason=reason, retry_after_seconds=wish)

    def may_ask(self, now: float) -> bool:
        """Whether the origin may be asked: at most once per deadline, unless a read has succeeded since then."""
        return now - self._asked_at >= self._deadline_seconds

    def silent_seconds(self, now: float) -> float:
        """How long a request may wait for its answer. Without limit while the origin may not be asked again."""
        return self.at_opening_seconds if self.may_ask(now) else math.inf

    @property
    def at_opening_seconds(self) -> float:
        """How long the first request to a mirror may wait for its answer."""
        return self._deadline_seconds * SILENT_DEADLINES

    def lasting(self, error: SourceError, now: float) -> bool:
        """Record a failure of the current target. Returns whether it is more than a momentary one.

        A refusal counts as lasting, because expired signed links are refused in many ways. A timeout and an answer with
        Retry-After count as well. Any other failure counts if an earlier one, at least MOMENT_SECONDS ago, was not
        followed by a successful read.
        """
        failing_for = now - self._failing_since
        self._failing_since = min(self._failing_since, now)
        if not isinstance(error, SourceUnreachable):
            return True
        return error.reason is Reason.TIMEOUT or bool(error.retry_after_seconds) or failing_for >= MOMENT_SECONDS


@contextlib.contextmanager
def as_transient(at_mirror: bool = True) -> Iterator[None]:
    """Turn a permanent error into a transient one: if one mirror lacks the file, others may have it.

    SourceChanged is raised unchanged.
    """
    try:
        yield
    except (SourceChanged, SourceUnreachable):
        raise
    except SourceError as exc:
        if not at_mirror:
            raise
        raise SourceUnreachable(str(exc), reason=Reason.SERVER) from exc
