"""Notices that a source is back: while requests wait for that, one task asks the source for a byte again and again.

Owns that task, and the list of those to wake. Must not know what waits, nor why. However many requests wait, the source
gets one small request at a time, with the back-off of `RetryingSource`. So an outage costs no processor time worth
mentioning.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator

import trio

from qedfs.errors import QedfsError, SourceChanged, SourceError
from qedfs.source.retrying import LONGEST_PAUSE_SECONDS, RetryingSource

log = logging.getLogger(__name__)

AGAIN_SECONDS = 1.0  # after a success: those that were woken may find that the source has gone again


class Comeback:
    """The watch over one source."""

    def __init__(self, remote: RetryingSource, nursery: trio.Nursery) -> None:
        """`nursery` runs the task."""
        self._remote = remote
        self._nursery = nursery
        self._wakes: Counter[Callable[[], None]] = Counter()
        self._asking: trio.CancelScope | None = None  # around the task, while it runs

    @contextlib.contextmanager
    def awaited(self, wake: Callable[[], None]) -> Iterator[None]:
        """Watch the source meanwhile. `wake` is called when it has answered, and when it never will as it should."""
        self._wakes[wake] += 1
        if self._asking is None:
            self._asking = trio.CancelScope()
            self._nursery.start_soon(self._ask_until_answered, self._asking)
        try:
            yield
        finally:
            self._wakes[wake] -= 1
            if not self._wakes[wake]:
                del self._wakes[wake]
            if not self._wakes and self._asking is not None:
                self._asking.cancel()
                self._asking = None

    async def _ask_until_answered(self, scope: trio.CancelScope) -> None:
        with scope:
            while True:
                seconds = LONGEST_PAUSE_SECONDS
                if await self._answers():
                    for wake in list(self._wakes):
                        wake()
                    seconds = AGAIN_SECONDS
                await trio.sleep(seconds)

    async def _answers(self) -> bool:
        """Ask for a byte. Returns whether those who wait should try again."""
        try:
            # With a connection from before the outage, `connect` would succeed without asking anything.
            identity = self._remote.identity or await self._remote.connect()
            if identity.size:
                await self._remote.read(0, memoryview(bytearray(1)), urgent=True)
        except SourceChanged:
            return True  # their own attempts will tell them
        except SourceError as exc:
            # Even one that a retry does not remedy as a rule: a server that is being started may lack its export.
            log.debug("backing %s is still away: %s", self._remote.location, exc)
            return False
        except QedfsError:
            return True
        except Exception:
            # This task runs in a nursery of the mount: if it raised, a bug here would end every image.
            log.exception("backing %s: cannot be asked whether it is back", self._remote.location)
            return False
        return True

    async def probe(self, pos: int) -> None:
        """Request a byte from a dead source, in a task that outlives the reader, as a flight does.

        Otherwise a source that is back but needs longer than the reader's short wait would be considered dead for ever.
        """
        try:
            await self._remote.read(pos, memoryview(bytearray(1)), urgent=True)
        except QedfsError as exc:
            log.debug("probe of a dead source: %s", exc)
        except Exception:
            log.exception("cannot probe a dead source")  # logged only, as above
