"""Many libcurl transfers at once, driven by trio.

Owns a `pycurl.CurlMulti`, the epoll object that watches its sockets, and the task that waits for both sockets and
timer. Must not know HTTP, URLs or what a transfer is for.

How it waits. libcurl says which sockets it wants watched (M_SOCKETFUNCTION) and when it wants to be called at the
latest (M_TIMERFUNCTION). The sockets go into an epoll object of our own, and one task waits, through trio, until that
object is readable or the deadline is over. One descriptor in trio's own epoll however many sockets there are: no task
per socket, and no watcher to cancel when libcurl closes a socket and the system gives its number to another one.

Concurrency. Everything but the closing happens in trio's thread. Tasks that call `perform` and the one pump task share
`_flights`; no callback awaits, and none of libcurl's functions is called from inside a callback. A callback never
raises into libcurl (pycurl would print the exception and lose it): what goes wrong is kept in `_fault` and ends the
flights once libcurl has returned. Interrupts (Ctrl-C) are held back for the same reason while libcurl is on the stack.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import select
import threading

import pycurl
import trio

from qedfs.source.http.errors import TransferFailed, said

# At most so many ready sockets are served before other tasks get their turn; each may bring some MiB.
_SOCKETS_PER_TURN = 8

_CLOSE_SECONDS = 0.05  # how long closing may hold up the whole program

_POLL_TO_EPOLL = {
    pycurl.POLL_IN: select.EPOLLIN,
    pycurl.POLL_OUT: select.EPOLLOUT,
    pycurl.POLL_INOUT: select.EPOLLIN | select.EPOLLOUT,
}
_BROKEN = select.EPOLLERR | select.EPOLLHUP


class MultiClosed(Exception):
    """The Multi was closed while, or before, the transfer ran. Never leaves this package."""


class _Flight:
    """A transfer that libcurl works on: how it ended, and the event that tells so."""

    __slots__ = ("done", "error")

    def __init__(self) -> None:
        self.done = trio.Event()
        self.error: Exception | None = None


class Multi:
    """A set of transfers with a connection pool of its own. Its pump runs in `nursery` until `aclose`."""

    def __init__(self, nursery: trio.Nursery, *, max_connections: int) -> None:
        """OSError: the system has nothing left that it takes."""
        self._epoll = select.epoll()
        try:
            self._multi = pycurl.CurlMulti()
        except pycurl.error as exc:  # it does not say why: what it needs beside some memory is a pair of sockets
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE)) from exc
        self._multi.setopt(pycurl.M_SOCKETFUNCTION, self._on_socket)
        self._multi.setopt(pycurl.M_TIMERFUNCTION, self._on_timer)
        self._multi.setopt(pycurl.M_MAX_TOTAL_CONNECTIONS, max_connections)
        self._multi.setopt(pycurl.M_MAXCONNECTS, max_connections)
        self._flights: dict[pycurl.Curl, _Flight] = {}
        self._fault: Exception | None = None
        self._closed = False
        self._stop = trio.CancelScope()
        self._stopped = trio.Event()
        self._deadline = math.inf  # seconds of trio's clock
        self._timer = trio.CancelScope()  # of the pump's current wait
        nursery.start_soon(self._pump)

    async def perform(self, curl: pycurl.Curl) -> None:
        """Run one transfer to its end. Cancelling takes it out of libcurl, which closes its connection.

        Raises:
            TransferFailed: libcurl's result is not CURLE_OK.
            OSError: the system would not watch a socket.
            MultiClosed: `aclose` was called, or the nursery ended.
        """
        if self._closed:
            raise MultiClosed
        flight = _Flight()
        self._depart(curl, flight)
        try:
            await flight.done.wait()
        finally:
            self._remove(curl)
        if flight.error is not None:
            raise flight.error

    async def aclose(self) -> None:
        """End all transfers with MultiClosed and drop all connections."""
        self._stop.cancel()
        with trio.CancelScope(shield=True):
            await self._stopped.wait()

    @trio.lowlevel.enable_ki_protection
    def _depart(self, curl: pycurl.Curl, flight: _Flight) -> None:
        try:
            self._multi.add_handle(curl)
        except pycurl.error as exc:
            raise TransferFailed(pycurl.E_FAILED_INIT) from exc
        self._flights[curl] = flight
        # A warm connection sends its request right here instead of a turn of the scheduler later.
        self._act(pycurl.SOCKET_TIMEOUT, 0)
        self._reap()

    @trio.lowlevel.enable_ki_protection
    def _remove(self, curl: pycurl.Curl) -> None:
        if self._flights.pop(curl, None) is not None:
            self._multi.remove_handle(curl)

    async def _pump(self) -> None:
        try:
            with self._stop:
                while True:
                    with trio.CancelScope(deadline=self._deadline) as self._timer:
                        await trio.lowlevel.wait_readable(self._epoll.fileno())
                    self._turn()
        finally:
            self._shut_down()

    @trio.lowlevel.enable_ki_protection
    def _turn(self) -> None:
        if trio.current_time() >= self._deadline:
            self._set_deadline(math.inf)
            self._act(pycurl.SOCKET_TIMEOUT, 0)
            # libcurl tells a deadline only when it differs from the last one told. If ours ran out a moment early,
            # by another clock than libcurl's, it stays silent; so ask.
            self._on_timer(self._multi.timeout())
        for fd, events in self._epoll.poll(0, _SOCKETS_PER_TURN):
            bits = pycurl.CSELECT_ERR if events & _BROKEN else 0
            if events & (select.EPOLLIN | _BROKEN):
                bits |= pycurl.CSELECT_IN
            if events & (select.EPOLLOUT | _BROKEN):
                bits |= pycurl.CSELECT_OUT
            self._act(fd, bits)
        self._reap()

    @trio.lowlevel.enable_ki_protection
    def _shut_down(self) -> None:
        self._closed = True
        self._land_all(MultiClosed())
        # libcurl waits here for a name look-up that nobody waits for any more: 5 seconds were seen with a silent name
        # server. Other sources must not stand still for that. Without a look-up the thread ends at once.
        thread = threading.Thread(target=self._dismantle, name="qedfs-http-close", daemon=True)
        thread.start()
        thread.join(_CLOSE_SECONDS)
        self._stopped.set()

    def _dismantle(self) -> None:
        self._multi.close()  # takes its sockets out of the epoll object, so that comes last
        self._epoll.close()

    def _act(self, fd: int, bits: int) -> None:
        try:
            self._multi.socket_action(fd, bits)
        except pycurl.error as exc:
            # The code is of another kind (CURLMcode) than that of a transfer.
            self._fault = TransferFailed(pycurl.E_FAILED_INIT)
            self._fault.__cause__ = exc

    def _reap(self) -> None:
        """Hand the ended transfers back to the tasks that wait for them."""
        more = 1
        while more:
            more, good, bad = self._multi.info_read()
            for curl in good:
                self._land(curl, None)
            for curl, code, text in bad:
                self._land(curl, TransferFailed(code, said(text)))
        if self._fault is not None:
            # libcurl does not tell for which transfer it wanted the socket, so all of them have to go.
            self._land_all(self._fault)
            self._fault = None

    def _land(self, curl: pycurl.Curl, error: Exception | None) -> None:
        flight = self._flights.get(curl)
        if flight is not None:
            self._remove(curl)
            flight.error = error
            flight.done.set()

    def _land_all(self, error: Exception) -> None:
        for curl in list(self._flights):
            self._land(curl, error)

    def _on_socket(self, what: int, fd: int, _multi: object, _data: object) -> None:
        if what == pycurl.POLL_REMOVE:
            with contextlib.suppress(OSError):  # it was never watched, or is closed: then nothing watches it now
                self._epoll.unregister(fd)
            return
        try:
            events = _POLL_TO_EPOLL.get(what, 0)
            try:
                self._epoll.modify(fd, events)
            except FileNotFoundError:
                self._epoll.register(fd, events)
        except Exception as exc:
            self._fault = exc

    def _on_timer(self, timeout_ms: int) -> None:
        try:
            self._set_deadline(math.inf if timeout_ms < 0 else trio.current_time() + timeout_ms / 1000)
        except Exception as exc:
            self._fault = exc

    def _set_deadline(self, deadline: float) -> None:
        self._deadline = deadline
        self._timer.deadline = deadline  # the pump may be waiting right now
