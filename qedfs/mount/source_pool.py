"""The sources that the images of one mount share, each with its fetch queues.

Owns a source from the first overlay that needs it to the last. Must not know which images exist. An image in standby
has a source of its own, and so has one that was activated: it must not get what another image has asked for before.

The policy is applied as soon as an overlay appears, so that a refusal shows in status and in the log. The source
applies it again before it opens anything, so this first check may be abandoned: the path of a local backing may lead
to a dead file server, which must not delay the other images.
"""

from __future__ import annotations

import itertools
from collections import deque

import trio

from qedfs.errors import SourceError, UsageError
from qedfs.fetch.buffer_pool import MOST_BYTES, BufferPool
from qedfs.fetch.queue import FetchQueue
from qedfs.fetch.total_limit import TotalLimit
from qedfs.host import memory_pool
from qedfs.host.descriptors import check_room
from qedfs.image.standby import DEADLINE_SECONDS, PassThrough
from qedfs.mount.fuse_init import background_limit
from qedfs.mount.rescue_source import rescue_source
from qedfs.overlay.overlay import Overlay
from qedfs.source.circuit_breaker import ReaderSlots
from qedfs.source.credentials import NO_CREDENTIALS, Credentials
from qedfs.source.open import allowed, remote_source
from qedfs.source.pinning import USUAL, By, Pinning
from qedfs.source.policy import Policy
from qedfs.source.retrying import RetryingSource
from qedfs.source.url import Location, parse_location

CHECK_SECONDS = 1.0  # for all first policy checks of one scan together
PAST_FETCHES = 16
FREE_SHARE = 8  # at most 1/8 of the memory for fetched bytes may be free buffers

# URL, whether the backing is raw, and 0 for a source that overlays share, or else the number of one that they do not
Place = tuple[str, bool, int]


class SourcePool:
    """The sources of one mount."""

    def __init__(
        self,
        root: str,
        policy: Policy,
        deadline_seconds: float,
        nursery: trio.Nursery,
        pinning: Pinning = USUAL,
        credentials: Credentials = NO_CREDENTIALS,
        limit_total: int = 0,
    ) -> None:
        """`root`: the folder of the overlays. `nursery` runs the tasks of the connections.

        `limit_total`: background bytes per second from all sources together, 0 for no limit.
        """
        self.total = TotalLimit(limit_total)
        self._root = root
        self._policy = policy
        self._credentials = credentials
        self._deadline_seconds = deadline_seconds
        self._pinning = pinning
        self._nursery = nursery
        self._check_seconds_left = CHECK_SECONDS
        self._remotes: dict[Place, RetryingSource] = {}
        self._own = itertools.count(1)
        self._slots = ReaderSlots(background_limit())  # of the readers of all sources together
        self.buffers = BufferPool(
            min(MOST_BYTES, memory_pool.FETCHED.most_bytes // FREE_SHARE)
        )  # of all queues together
        self._fetches: dict[tuple[str, bool, int, int], FetchQueue] = {}
        self._past_fetches: deque[FetchQueue] = deque(maxlen=PAST_FETCHES)

    def fetches(self) -> list[FetchQueue]:
        """The fetch queues in use, and the last PAST_FETCHES that were, whose counters are still of interest."""
        return [*self._fetches.values(), *self._past_fetches]

    def begin_scan(self) -> None:
        """Grant the overlays that are opened from now on CHECK_SECONDS together for their first policy checks."""
        self._check_seconds_left = CHECK_SECONDS

    @property
    def count(self) -> int:
        """How many sources are in use."""
        return len(self._remotes)

    async def fetch_for(self, overlay: Overlay, *, overlays: int) -> FetchQueue | None:
        """The queue for an overlay's backing, shared by all overlays on the same source; None without a backing.

        Raises:
            Refused: the policy does not allow the backing.
            SourceError: the name of the backing is malformed.
            OSError: EMFILE, too few descriptors for another source in addition to this number of open `overlays`.
        """
        if overlay.backing is None:
            return None
        location = await self._location(overlay)
        # If one overlay uses a URL as raw and another one probes its format, these are two sources.
        place = (location.secret_url, not overlay.probes_backing, 0)
        if place not in self._remotes:
            check_room(overlays, self.count + 1)
            self._remotes[place] = self._source(location, overlay, self._deadline_seconds, self._pinning)
        return self._fetch(place, overlay)

    async def own_fetch_for(self, overlay: Overlay, *, overlays: int) -> FetchQueue:
        """A new queue with a new source for an overlay's backing, shared with nobody. Not connected yet.

        `release` closes it. Raises what `fetch_for` raises.
        """
        location = await self._location(overlay)
        check_room(overlays, self.count + 1)
        place = (location.secret_url, not overlay.probes_backing, next(self._own))
        self._remotes[place] = self._source(location, overlay, self._deadline_seconds, self._pinning)
        return self._fetch(place, overlay)

    async def fetch_at(self, location: Location, overlay: Overlay, *, overlays: int) -> FetchQueue:
        """Like `own_fetch_for`, of another place than the overlay names. Raises Refused if the policy forbids it."""
        await allowed(location, self._policy)
        check_room(overlays, self.count + 1)
        place = (location.secret_url, not overlay.probes_backing, next(self._own))
        self._remotes[place] = self._source(location, overlay, self._deadline_seconds, self._pinning)
        return self._fetch(place, overlay)

    def fetch_from(self, remote: RetryingSource, overlay: Overlay) -> FetchQueue:
        """A new queue with this source, for one overlay. `release` closes it."""
        place = (remote.location.secret_url, not overlay.probes_backing, next(self._own))
        self._remotes[place] = remote
        return self._fetch(place, overlay)

    @property
    def policy(self) -> Policy:
        """Which places may be opened."""
        return self._policy

    @property
    def root(self) -> str:
        """The folder of the overlays, to which a path is relative."""
        return self._root

    async def pass_through_for(self, overlay: Overlay, *, overlays: int) -> PassThrough:
        """What an overlay in standby reads from, shared with nobody. Raises what `fetch_for` raises."""
        location = await self._location(overlay)
        check_room(overlays, self.count + 1)
        told: set[str] = set()

        def make() -> RetryingSource:
            place = (location.secret_url, not overlay.probes_backing, next(self._own))
            seconds = min(self._deadline_seconds, DEADLINE_SECONDS)
            made = self._remotes[place] = self._source(location, overlay, seconds, Pinning(By.NONE), told)
            return made

        return PassThrough(make, self.release_soon)

    async def copy_for(self, place: str, *, device: str, backing_format: str | None, overlays: int) -> RetryingSource:
        """Another copy of a source; see `rescue_source`, and what that raises. Who asks for it closes it."""
        check_room(overlays, self.count + 1)
        return await rescue_source(
            place,
            self._nursery,
            device=device,
            backing_format=backing_format,
            credentials=self._credentials,
            deadline_seconds=self._deadline_seconds,
        )

    async def _location(self, overlay: Overlay) -> Location:
        try:
            location = parse_location(overlay.backing or "", relative_to=self._root)
        except UsageError as exc:  # said of what a user types; here it is a text in a file
            raise SourceError(str(exc)) from exc
        await self._check_policy(location)
        return location

    def _source(
        self,
        location: Location,
        overlay: Overlay,
        deadline_seconds: float,
        pinning: Pinning,
        told: set[str] | None = None,
    ) -> RetryingSource:
        return remote_source(
            location,
            self._policy,
            self._nursery,
            deadline_seconds=deadline_seconds,
            raw=not overlay.probes_backing,
            pinning=pinning,
            slots=self._slots,
            credentials=self._credentials,
            told=told,
        )

    def _fetch(self, place: Place, overlay: Overlay) -> FetchQueue:
        key = (*place, overlay.cluster_size)
        if key not in self._fetches:
            self._fetches[key] = FetchQueue(
                self._remotes[place], overlay.cluster_size, self._nursery, buffers=self.buffers, total=self.total
            )
        return self._fetches[key]

    async def _check_policy(self, location: Location) -> None:
        began = trio.current_time()
        with trio.move_on_after(self._check_seconds_left):
            await allowed(location, self._policy)
        self._check_seconds_left = max(0.0, self._check_seconds_left - (trio.current_time() - began))

    async def release(self, remote: RetryingSource) -> None:
        """Close the connections to a source that no overlay needs any more, so that its server can stop."""
        for place in [place for place, known in self._remotes.items() if known is remote]:
            del self._remotes[place]
        for key in [key for key, known in self._fetches.items() if known.remote is remote]:
            self._past_fetches.append(self._fetches.pop(key))
        await remote.aclose()

    def release_soon(self, remote: RetryingSource) -> None:
        """Like `release`, without waiting for it: a connection to a server that hangs takes a while to close."""
        self._nursery.start_soon(self.release, remote)

    async def aclose(self) -> None:
        """Close all connections."""
        for remote in list(self._remotes.values()):  # others may be released meanwhile
            await remote.aclose()
