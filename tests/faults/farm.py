"""Many scripted servers in this process, HTTP and NBD, one for each row of the tables, all with the same content.

Owns their threads. A row's server can be told at any moment to behave otherwise.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple, Protocol, Self

import trio

from tests.fakes import http_behaviours, nbd_behaviours
from tests.fakes.http_server import FakeHttpServer
from tests.fakes.nbd_server import CORRECT, FakeNbd

# Where clouds serve credentials; no policy of ours leads there.
FORBIDDEN_URL = "http://169.254.169.254/disk.raw"

# Answers that a client may take at its first look, and that make what it has taken another version than the usual one.
# The server then keeps to its word: it goes on like this, in all other ways right.
OF_ITS_OWN_VERSION = {"other-etag", "other-date", "wrong-total"}


class Row(NamedTuple):
    """One line of a table: who answers, how, and from when on."""

    protocol: str  # "http" or "nbd"
    behaviour: str
    when: str  # "first": from the first connection on; "later": after a right answer

    @property
    def name(self) -> str:
        """The name of its overlay."""
        return f"{self.protocol}-{self.when}-{self.behaviour}"

    @property
    def can_be_cured(self) -> bool:
        """Whether the scripted server can serve it rightly; it knows no TLS."""
        return self.protocol == "http" or self.behaviour not in nbd_behaviours.TLS


def all_rows() -> list[Row]:
    """Both tables. An NBD server that misbehaves while it is opened does so at reconnection as well."""
    rows = [Row("http", name, when) for when in ("first", "later") for name in http_behaviours.BEHAVIOURS]
    rows += [Row("nbd", name, "first") for name in nbd_behaviours.BEHAVIOURS]
    at_opening = {**nbd_behaviours.OPENING, **nbd_behaviours.OPENING_LATER}
    return rows + [Row("nbd", name, "later") for name in at_opening]


class Fake(Protocol):
    """The server of one row."""

    url: str

    def misbehave(self) -> None:
        """Behave as the row says."""
        ...

    def behave(self) -> None:
        """Serve rightly; who is still waiting for a bad answer is hung up on."""
        ...


class Farm:
    """The servers of these rows, while the `with` block lasts."""

    def __init__(self, rows: Sequence[Row], content: bytes) -> None:
        self.fakes: dict[Row, Fake] = {}
        self._rows = rows
        self._content = content
        self._http: list[FakeHttpServer] = []
        self._token: trio.lowlevel.TrioToken | None = None
        self._scope = trio.CancelScope()
        self._listening = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._serve_nbd,), name="fake-nbd")

    def __enter__(self) -> Self:
        self._thread.start()
        self._listening.wait()
        for row in self._rows:
            if row.protocol == "http":
                server = FakeHttpServer(self._content)
                server.redirect_to = FORBIDDEN_URL
                self._http.append(server)
                self.fakes[row] = _Http(row, server)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for server in self._http:
            server.close()
        assert self._token is not None
        self._token.run_sync_soon(self._scope.cancel)
        self._thread.join()

    async def _serve_nbd(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        with self._scope:
            async with trio.open_nursery() as nursery:
                for row in self._rows:
                    if row.protocol == "nbd":
                        await self._start_nbd(row, nursery)
                self._listening.set()
                await trio.sleep_forever()

    async def _start_nbd(self, row: Row, nursery: trio.Nursery) -> None:
        fake = FakeNbd(self._content)

        async def handle(stream: trio.SocketStream) -> None:
            try:
                await fake.handle(stream)
            except Exception:
                # A script that does not fit the request it meets: to the client, a server that dies.
                stream.socket.close()

        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listeners[0].socket.getsockname()[1]
        nursery.start_soon(trio.serve_listeners, handle, listeners)
        scheme = "nbds" if row.behaviour in nbd_behaviours.TLS else "nbd"
        assert self._token is not None
        self.fakes[row] = _Nbd(row, fake, f"{scheme}://127.0.0.1:{port}/", self._token)


class _Http:
    def __init__(self, row: Row, server: FakeHttpServer) -> None:
        self.url = server.url()
        self._row = row
        self._server = server

    def misbehave(self) -> None:
        self._server.behaviour = self._row.behaviour

    def behave(self) -> None:
        of_its_own = self._row.when == "first" and self._row.behaviour in OF_ITS_OWN_VERSION
        self._server.behaviour = self._row.behaviour if of_its_own else "ok"


class _Nbd:
    def __init__(self, row: Row, fake: FakeNbd, url: str, token: trio.lowlevel.TrioToken) -> None:
        self.url = url
        self._row = row
        self._fake = fake
        self._token = token

    def misbehave(self) -> None:
        self._fake.behaviour = nbd_behaviours.BEHAVIOURS[self._row.behaviour]
        if self._row.when == "later":
            self._token.run_sync_soon(self._fake.hang_up)

    def behave(self) -> None:
        self._fake.behaviour = CORRECT
        self._token.run_sync_soon(self._fake.hang_up)
