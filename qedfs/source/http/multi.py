"""The bridge between libcurl's multi interface and trio: runs many transfers at once.

Owns a `pycurl.CurlMulti`, the epoll object that watches its sockets, and the pump task that waits for sockets and the
timer. Must not know HTTP, URLs or what a transfer is for.

Waiting. libcurl says which sockets it wants watched (M_SOCKETFUNCTION) and when it must be called at the latest
(M_TIMERFUNCTION). The sockets are registered in an epoll object of our own. The pump waits, through trio, until that
object is readable or the deadline has passed. So trio's own epoll has one descriptor, however many sockets there are.
There is no task per socket, and no watcher to cancel when libcurl closes a socket and the system reuses its number.
While bytes may gather (`gather`), the pump first sleeps, and then asks the object directly, without a wait.

Concurrency. Everything except the closing happens in trio's thread. The tasks that call `perform` and the pump share
`_flights`. No callback awaits, and no function of libcurl is called from inside a callback. A callback never raises
into libcurl, because pycurl would print the exception and lose it. Instead, the exception is stored in `_fault` and
ends the flights after libcurl has returned. For the same reason, KeyboardInterrupt is deferred while libcurl is on the
stack.
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

# How many ready sockets are served before other tasks get their turn. Each may deliver some MiB.
_SOCKETS_PER_POLL = 8

_CLOSE_SECONDS = 0.05  # how long closing may block the event loop

_POLL_TO_EPOLL = {
    pycurl.POLL_IN: select.EPOLLIN,
    pycurl.POLL_OUT: select.EPOLLOUT,
    pycurl.POLL_INOUT: select.EPOLLIN | select.EPOLLOUT,
}
_BROKEN = select.EPOLLERR | select.EPOLLHUP


class MultiClosed(Exception):
    """The Multi was closed while, or before, the transfer ran. Never leaves this package."""


class _Flight:
    """A running transfer: the event that signals its end, and its error."""

    __slots__ = ("done", "error")

    def __init__(self) -> None:
        self.done = trio.Event()
        self.error: Exception | None = None


class Multi:
    """A set of transfers with its own connection pool. The pump runs in `nursery` until `aclose`."""

    def __init__(self, nursery: trio.Nursery, *, max_connections: int) -> None:
        """Raises OSError if the system is out of descriptors or memory."""
        self._epoll = select.epoll()
        try:
            self._multi = pycurl.CurlMulti()
        except pycurl.error as exc:  # libcurl does not say why; it needs memory and a pair of sockets
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
        self._gather_seconds = 0.0
        self._gathering = trio.CancelScope()  # of the pump's current sleep
        nursery.start_soon(self._pump)

    async def perform(self, curl: pycurl.Curl) -> None:
        """Run one transfer to its end. Cancelling removes it from libcurl, which closes its connection.

        Raises:
            TransferFailed: libcurl's result is not CURLE_OK.
            OSError: a socket could not be watched.
            MultiClosed: `aclose` was called, or the nursery ended.
        """
        if self._closed:
            raise MultiClosed
        flight = _Flight()
        self._start(curl, flight)
        try:
            await flight.done.wait()
        finally:
            self._remove(curl)
        if flight.error is not None:
            raise flight.error

    def gather(self, seconds: float) -> None:
        """See `Gathers.gather`."""
        self._gather_seconds = seconds
        if not seconds:
            self._gathering.cancel()

    async def aclose(self) -> None:
        """End all transfers with MultiClosed and drop all connections."""
        self._stop.cancel()
        with trio.CancelScope(shield=True):
            await self._stopped.wait()

    @trio.lowlevel.enable_ki_protection
    def _start(self, curl: pycurl.Curl, flight: _Flight) -> None:
        try:
            self._multi.add_handle(curl)
        except pycurl.error as exc:
            raise TransferFailed(pycurl.E_FAILED_INIT) from exc
        self._flights[curl] = flight
        # On a warm connection this sends the request at once, instead of after a round of the event loop.
        self._socket_action(pycurl.SOCKET_TIMEOUT, 0)
        self._reap()

    @trio.lowlevel.enable_ki_protection
    def _remove(self, curl: pycurl.Curl) -> None:
        if self._flights.pop(curl, None) is not None:
            self._multi.remove_handle(curl)

    async def _pump(self) -> None:
        try:
            with self._stop:
                served = 0
                while True:
                    if self._gather_seconds and self._flights and served < _SOCKETS_PER_POLL:
                        await self._let_gather()
                        served = self._handle_events()
                        if served:
                            continue
                    with trio.CancelScope(deadline=self._deadline) as self._timer:
                        await trio.lowlevel.wait_readable(self._epoll.fileno())
                    served = self._handle_events()
        finally:
            self._shut_down()

    async def _let_gather(self) -> None:
        until = min(self._deadline, trio.current_time() + self._gather_seconds)
        with trio.CancelScope(deadline=until) as self._gathering:
            await trio.sleep_forever()

    @trio.lowlevel.enable_ki_protection
    def _handle_events(self) -> int:
        """Let libcurl work on what is due. Returns how many sockets were ready."""
        if trio.current_time() >= self._deadline:
            self._set_deadline(math.inf)
            self._socket_action(pycurl.SOCKET_TIMEOUT, 0)
            # libcurl reports a deadline only if it differs from the last one reported. If ours passed a moment early,
            # because trio has another clock, libcurl reports nothing. So ask for the deadline.
            self._on_timer(self._multi.timeout())
        ready = self._epoll.poll(0, _SOCKETS_PER_POLL)
        for fd, events in ready:
            bits = pycurl.CSELECT_ERR if events & _BROKEN else 0
            if events & (select.EPOLLIN | _BROKEN):
                bits |= pycurl.CSELECT_IN
            if events & (select.EPOLLOUT | _BROKEN):
                bits |= pycurl.CSELECT_OUT
            self._socket_action(fd, bits)
        self._reap()
        return len(ready)

    @trio.lowlevel.enable_ki_protection
    def _shut_down(self) -> None:
        self._closed = True
        self._finish_all(MultiClosed())
        # libcurl waits here for a running name resolution, although nobody needs its result: up to 5 seconds were
        # observed with a silent name server. Other sources must not stall meanwhile. If nothing is being resolved, the
        # thread ends at once.
        thread = threading.Thread(target=self._close_libcurl, name="qedfs-http-close", daemon=True)
        thread.start()
        thread.join(_CLOSE_SECONDS)
        self._stopped.set()

    def _close_libcurl(self) -> None:
        self._multi.close()  # first, because it unregisters its sockets from the epoll object
        self._epoll.close()

    def _socket_action(self, fd: int, bits: int) -> None:
        try:
            self._multi.socket_action(fd, bits)
        except pycurl.error as exc:
            # Not its own code: that is a CURLMcode, and the code of a transfer is a CURLcode.
            self._fault = TransferFailed(pycurl.E_FAILED_INIT)
            self._fault.__cause__ = exc

    def _reap(self) -> None:
        """Wake the tasks whose transfers have ended."""
        more = 1
        while more:
            more, good, bad = self._multi.info_read()
            for curl in good:
                self._finish(curl, None)
            for curl, code, text in bad:
                self._finish(curl, TransferFailed(code, said(text)))
        if self._fault is not None:
            # libcurl does not say which transfer the callback was for, so all of them fail.
            self._finish_all(self._fault)
            self._fault = None

    def _finish(self, curl: pycurl.Curl, error: Exception | None) -> None:
        flight = self._flights.get(curl)
        if flight is not None:
            self._remove(curl)
            flight.error = error
            flight.done.set()

    def _finish_all(self, error: Exception) -> None:
        for curl in list(self._flights):
            self._finish(curl, error)

    def _on_socket(self, what: int, fd: int, _multi: object, _data: object) -> None:
        if what == pycurl.POLL_REMOVE:
            with contextlib.suppress(OSError):  # it was never registered, or is closed, which unregisters it
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
        self._timer.deadline = deadline  # in case the pump is waiting now
