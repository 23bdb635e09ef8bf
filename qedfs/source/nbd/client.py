"""NbdSource: an NBD export as a `Source`, over a few connections to one server.

Owns the choice of connection for each read, and when to open another one. Must not know the protocol. The source
does not retry: a read is attempted on one connection only, which is opened first if none is left.

As soon as there are two live connections, the first is reserved for urgent reads and for queries about holes. More
connections are opened in the background, while reads continue on the existing ones. So a server that announces that it
takes several connections but does not accept them (`qemu-nbd --shared=1`) delays no reader.

A new connection may lead to another version than the others, because the server may have been restarted, or may start
a process per connection. NBD reports no more than a size and perhaps a description, so blocks that were read earlier
are compared before the connection is used (`samples.py`).

Concurrency. Shared state changes only between two awaits. Readers that find no connection wait together for one
connection attempt (`_reconnection`), which continues even if one of them is cancelled.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import trio

from qedfs.errors import QedfsError, SourceChanged, SourceUnreachable
from qedfs.source.base import WEAK, Extent, Identity, Sameness, check_range
from qedfs.source.credentials import NO_TLS_FILES, TlsFiles
from qedfs.source.nbd import errors
from qedfs.source.nbd.connection import Connection
from qedfs.source.nbd.gathering import Gathering
from qedfs.source.nbd.protocol import Negotiated
from qedfs.source.nbd.tls import client_context
from qedfs.source.path import in_thread
from qedfs.source.pinning import USUAL, Pinning
from qedfs.source.policy import Policy
from qedfs.source.samples import Samples
from qedfs.source.single_flight import SingleFlight
from qedfs.source.url import Location

MAX_CONNECTIONS = 4
GROW_LOAD = 4  # requests in flight on each background connection before another one is opened
GROW_PAUSE_SECONDS = 60.0  # pause before the next attempt, after an attempt to open another connection has failed


class NbdSource:
    """A `Source` for an NBD export. Create it with `open`, close it with `aclose`."""

    def __init__(
        self,
        location: Location,
        nursery: trio.Nursery,
        connect: Callable[[], Awaitable[Connection]],
        connection: Connection,
        gathering: Gathering,
        pinning: Pinning,
        samples: Samples,
    ) -> None:
        """Takes over the first connection; `connect` opens further ones. Callers use `open`."""
        self._location = location
        self._nursery = nursery
        self._open_connection = connect
        self._received = 0  # bytes received over connections that have ended
        self._pinning = pinning
        self._samples = samples
        self._identity = self._identity_of(connection)
        self._negotiated = connection.negotiated
        self._connections = [connection]
        self._opening: set[trio.CancelScope] = set()
        self._reconnection = SingleFlight(
            nursery,
            self._connect,
            name=f"{location}: cannot connect again",
            cancelled=lambda: errors.dropped(location, "closed"),
        )
        self._growing = False
        self._grow_after = 0.0
        self._gathering = gathering
        self._closed = False

    @classmethod
    async def open(
        cls,
        location: Location,
        policy: Policy,
        nursery: trio.Nursery,
        *,
        tls: TlsFiles = NO_TLS_FILES,
        pinning: Pinning = USUAL,
        samples: Samples | None = None,
    ) -> NbdSource:
        """Connect, and learn the size of the export. Connections live in `nursery` until `aclose`.

        `tls`: our certificate or pre-shared key, and the trusted CA, unless the location itself names them. `samples`:
        taken from earlier reads of this version; new reads add to them.

        Raises:
            Refused: `policy` does not allow the server's address.
            SourceUnreachable: no answer within 10 s, or no usable answer for now.
            SourceError: the server will not serve this export to us (unknown export, TLS, not an NBD server).
        """
        context = None
        if location.tls:
            path = next(iter((*location.tls_files, *tls.paths)), "")
            context = await in_thread(path, lambda: client_context(location, tls))
        gathering = Gathering()
        connect = partial(Connection.open, location, policy, context, nursery, gathering)
        samples = Samples() if samples is None else samples
        return cls(location, nursery, connect, await connect(), gathering, pinning, samples)

    @property
    def identity(self) -> Identity:
        """The size of the export, and its description as a weak tag. NBD has no notion of a version."""
        return self._identity

    @property
    def negotiated(self) -> Negotiated:
        """What the server has announced at the first connection."""
        return self._negotiated

    @property
    def received(self) -> int:
        """Bytes received, including those of unfinished reads."""
        return self._received + sum(each.received for each in self._connections)

    async def read(self, pos: int, buffer: memoryview, *, urgent: bool = False) -> None:
        """Fill `buffer` with the bytes at `pos`; see `Source.read`."""
        view = buffer.cast("B")
        check_range(pos, len(view), self._identity.size)
        await trio.lowlevel.checkpoint_if_cancelled()
        if view:
            connection = await self._pick(urgent=urgent)
            await connection.read(pos, view)
            self._samples.offer(pos, view)

    def gather(self, seconds: float) -> None:
        """See `Gathers.gather`. Concerns all connections: no reader waits, except for queries about holes."""
        self._gathering.seconds = seconds

    async def extents(self, pos: int, size: int) -> Sequence[Extent] | None:
        """Which parts of a range read as zeros; needs base:allocation on the server. See `Source.extents`."""
        check_range(pos, size, self._identity.size)
        if not size:
            return []
        connection = await self._pick(urgent=True)
        described = await connection.extents(pos, size)
        if described is None:
            return None
        found: list[Extent] = []
        for extent_size, zero in described:
            found.append(Extent(pos, extent_size, zero))
            pos += extent_size
        return found

    async def aclose(self) -> None:
        """Drop all connections and cancel connection attempts; see `Source.aclose`."""
        self._closed = True
        for scope in self._opening:
            scope.cancel()
        connections, self._connections = self._connections, []
        try:
            for connection in connections:
                await connection.aclose()
        finally:
            for connection in connections:
                connection.drop("closed")

    # Which connection

    async def _pick(self, *, urgent: bool) -> Connection:
        if self._closed:
            raise errors.dropped(self._location, "closed")
        live = [each for each in self._connections if each.broken is None]
        if len(live) < len(self._connections):
            self._received += sum(each.received for each in self._connections if each.broken is not None)
        self._connections = live
        if not live:
            return await self._reconnection.result()
        if urgent or not self._negotiated.multi_conn:
            return live[0]
        background = live[1:] or live
        chosen = min(background, key=lambda each: each.load)
        if len(live) == 1 or chosen.load >= GROW_LOAD:
            self._grow(len(live))
        return chosen

    def _grow(self, have: int) -> None:
        if have < MAX_CONNECTIONS and not self._growing and trio.current_time() >= self._grow_after:
            self._nursery.start_soon(self._open_another)
            self._growing = True

    async def _open_another(self) -> None:
        try:
            await self._connect()
        except QedfsError:
            # Reads can do without another connection. If the export has changed, `_connect` has dropped the others.
            self._grow_after = trio.current_time() + GROW_PAUSE_SECONDS
        finally:
            self._growing = False

    async def _connect(self) -> Connection:
        """Open one more connection, and check that it leads to the same version of the export."""
        connection: Connection | None = None
        change = ""
        with trio.CancelScope() as scope:
            self._opening.add(scope)
            try:
                if not self._closed:
                    connection = await self._open_connection()
                    change = await self._change(connection)
            except BaseException:
                if connection is not None:
                    connection.drop("not wanted")
                raise
            finally:
                self._opening.discard(scope)
        # `aclose` may have been called before this task started, or right after the last answer of the handshake.
        if connection is not None and self._closed:
            connection.drop("closed")
        if connection is None or self._closed:
            raise SourceUnreachable(f"{self._location}: closed while connecting")
        if change:
            connection.drop("not wanted")
            # Each of the other connections may deliver either version.
            for each in self._connections:
                each.drop(f"the export changed: {change}")
            raise SourceChanged(f"{self._location}: the export changed: {change}")
        self._connections.append(connection)
        return connection

    def _identity_of(self, connection: Connection) -> Identity:
        told = connection.negotiated
        # Another description means another export. But a server may give all exports the same description, so it is
        # only a weak tag.
        tag = f"{WEAK}description {json.dumps(told.description)}" if told.description else None
        return self._pinning.counted(Identity(told.size, tag, name=str(self._location)))

    async def _change(self, connection: Connection) -> str:
        """How the version at a new connection differs from ours, or "" if it is the same."""
        shown = self._identity_of(connection)
        verdict = self._identity.compare(shown)
        if verdict.sameness is Sameness.CHANGED:
            return verdict.why
        different = await self._samples.difference(connection.read, shown.size)
        if different is None and verdict.sameness is Sameness.DOUBTED and not self._samples:
            return verdict.why
        return different or ""
