"""The stalled requests of one image: those that wait, longer than the source's deadline, until the source is back.

Owns the image's rule for a source that is away (`source_errors.py`), the stalled requests and what wakes them. Must not
know what a request asks for, nor how a source is tried.

A request that the source has not answered within its deadline gets an error, or is stalled if the rule is `wait`. A
stalled request costs a request slot of the kernel and its buffer, nothing else: no task polls for it. It continues, and
tries again, when the source is back (`fetch/comeback.py`), or when the image has got another source. Its wait ends with
an error

- at once if the rule becomes `eio`,
- at the bound of the rule, or just before the kernel would cut the mount because of it (`mount/request_timeout.py`),
- if nobody needs it any more (`mount/abandoned_reads.py`), and with the mount,
- if stalled requests take more than their share of the kernel's slots (`StallSlots`): one dead source must not keep
  the requests for other images from being answered.
"""

from __future__ import annotations

import dataclasses

import trio

from qedfs.errors import QedfsError, SourceChanged, SourceError
from qedfs.fetch.comeback import Comeback
from qedfs.image.source_errors import EIO, OnSourceError

UNBOUNDED = 1 << 20  # stalled requests if no kernel limits them: more than there ever are


class StallSlots:
    """How many requests of all images of a mount may be stalled: half of what the kernel lets be in flight.

    If all slots are taken, an image with fewer stalled requests takes over one of the image with the most. So each
    image of a dead source gets as many as the others, and none can take all.
    """

    def __init__(self, in_flight: int = UNBOUNDED) -> None:
        """`in_flight`: the kernel's limit for the mount."""
        self._most = max(1, in_flight // 2)
        self._taken = 0
        self._holders: set[Stalls] = set()

    def take(self, holder: Stalls) -> bool:
        """Take a slot. Returns False if there is none for this image."""
        if self._taken >= self._most:
            largest = max(self._holders, key=lambda one: one.count)
            if largest.count <= holder.count + 1:
                return False
            largest.drop_newest()  # its slot counts until its task has run, which is at the next await
        self._taken += 1
        self._holders.add(holder)
        return True

    def give(self, holder: Stalls) -> None:
        """Give a slot back. The holder no longer counts this request as stalled."""
        self._taken -= 1
        if not holder.count:
            self._holders.discard(holder)


@dataclasses.dataclass(slots=True, eq=False)
class _Stall:
    woken: trio.Event = dataclasses.field(default_factory=trio.Event)
    dropped: bool = False


class Stalls:
    """The stalled requests of one image."""

    def __init__(
        self, rule: OnSourceError = EIO, *, slots: StallSlots | None = None, kernel_seconds: float = float("inf")
    ) -> None:
        """`kernel_seconds`: longest wait for a source, whatever the rule, because of a limit of the kernel."""
        self.rule = rule
        self._slots = slots or StallSlots()
        self.kernel_seconds = kernel_seconds
        self._stalls: dict[_Stall, None] = {}

    @property
    def count(self) -> int:
        """How many requests are stalled."""
        return len(self._stalls)

    @property
    def most_seconds(self) -> float:
        """How long a request may wait for the source, with all its attempts."""
        if self.rule.bound_seconds is None:
            return self.kernel_seconds
        return min(self.kernel_seconds, self.rule.bound_seconds)

    def set_rule(self, rule: OnSourceError) -> None:
        """Change the rule, for the requests that are stalled, too."""
        self.rule = rule
        self.wake()

    def wake(self) -> None:
        """Let all stalled requests try again."""
        for stall in self._stalls:
            stall.woken.set()

    def drop_newest(self) -> None:
        """Let the request that was stalled last have its error. Called by `StallSlots`."""
        stall = next(iter(reversed(self._stalls)))
        del self._stalls[stall]
        stall.dropped = True
        stall.woken.set()

    def outlasts(self, error: QedfsError) -> bool:
        """Whether a request with this error waits for the source under the current rule."""
        return self.rule.wait and isinstance(error, SourceError) and not isinstance(error, SourceChanged)

    async def stall(self, error: QedfsError, comeback: Comeback) -> None:
        """Wait until another attempt may succeed.

        Raises:
            QedfsError: `error`, because the rule says so now, or because too many requests are stalled.
        """
        if not self._slots.take(self):
            raise error.fresh()
        stall = _Stall()
        self._stalls[stall] = None
        try:
            with comeback.awaited(self.wake):
                await stall.woken.wait()
        finally:
            self._stalls.pop(stall, None)
            self._slots.give(self)
        if stall.dropped or not self.rule.wait:
            raise error.fresh()
