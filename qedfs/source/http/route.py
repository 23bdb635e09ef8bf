"""Where reads go now, and when the URL that the user named is to be asked for the way again.

Owns the rule by which a place that a redirect led to is given up: a mirror dies, a signed link expires, and the origin
leads elsewhere by then. Must not know how it is asked. Pure; times are seconds of the caller's clock.

Another try at the same place comes first, since most trouble is one connection's. What lasts is taken to the origin,
and if that has not helped, not again before a deadline is over: a dead mirror with a thousand readers must not become
a thousand questions to the origin.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator

from qedfs.errors import QedfsError, Reason, SourceChanged, SourceError, SourceUnreachable
from qedfs.source.http.target import Target

# Failures of one moment are one failure, however many readers met it. Shorter than the pause before a second try.
MOMENT_SECONDS = 0.03
SILENT_DEADLINES = 1 / 3  # that a place may leave a request without an answer before the origin is asked


@dataclasses.dataclass(frozen=True, slots=True)
class Route:
    """Built once per resolution, so that a request costs no string work. `redirected`: it is not the origin itself."""

    target: Target
    lines: tuple[str, ...] = dataclasses.field(repr=False)
    cookies: tuple[bytes, ...] = dataclasses.field(repr=False)
    where: str
    redirected: bool
    conditional: bool = True  # the version goes along as a condition


class Doubt:
    """What the present place has done lately."""

    def __init__(self, deadline_seconds: float) -> None:
        self._deadline_seconds = deadline_seconds
        self._failing_since = math.inf  # no read has ended well since
        self._asked_at = -math.inf  # of the last look at the origin that no good read has followed
        self._in_vain = ""  # what it told instead of a way

    def good(self) -> None:
        """A read has ended well."""
        self._failing_since = math.inf
        self._asked_at = -math.inf
        self._in_vain = ""

    def asked(self, now: float) -> None:
        """The origin is asked."""
        self._asked_at = now
        self._in_vain = ""

    def failed(self, error: SourceError, asked: QedfsError | None = None) -> SourceUnreachable:
        """The error of the place as one that may pass. `asked`: why the origin, asked for another way, knew none."""
        if asked is not None:
            self._in_vain = f"; asked again, {asked}"
        reason = error.reason if isinstance(error, SourceUnreachable) else Reason.SERVER
        wish = error.retry_after_seconds if isinstance(error, SourceUnreachable) else None
        return SourceUnreachable(f"{error}{self._in_vain}", reason=reason, retry_after_seconds=wish)

    def may_ask(self, now: float) -> bool:
        """Whether the origin may be asked: not again within a deadline if nothing has been served since."""
        return now - self._asked_at >= self._deadline_seconds

    def silent_seconds(self, now: float) -> float:
        """How long a request may go without an answer. Once the origin has been asked, as long as its reader waits."""
        return self.at_opening_seconds if self.may_ask(now) else math.inf

    @property
    def at_opening_seconds(self) -> float:
        """The same for a question to a mirror whether it has the file."""
        return self._deadline_seconds * SILENT_DEADLINES

    def lasting(self, error: SourceError, now: float) -> bool:
        """Note a failure at the present place; returns whether it is more than a moment's trouble.

        A refusal is (signed links expire with all kinds of them), and so is a silence, which was waited out, and a
        server that asks for patience. The rest is once there is no success between two failures.
        """
        failing_for = now - self._failing_since
        self._failing_since = min(self._failing_since, now)
        if not isinstance(error, SourceUnreachable):
            return True
        return error.reason is Reason.TIMEOUT or bool(error.retry_after_seconds) or failing_for >= MOMENT_SECONDS


@contextlib.contextmanager
def passing(at_mirror: bool = True) -> Iterator[None]:
    """Turn a refusal into an error that may pass: one mirror that lacks the file says nothing about the others.

    Another version is another matter.
    """
    try:
        yield
    except (SourceChanged, SourceUnreachable):
        raise
    except SourceError as exc:
        if not at_mirror:
            raise
        raise SourceUnreachable(str(exc), reason=Reason.SERVER) from exc
