"""A TCP link to a server that can hold back what the server answers, as a dead or congested network does."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

from .servers import Server


class Link:
    """A link to `server`, which listens on TCP. `url` is the server's, at the link's address."""

    def __init__(self, server: Server, listener: socket.socket) -> None:
        assert isinstance(server.address, tuple)
        self.url = f"{server.scheme}://127.0.0.1:{listener.getsockname()[1]}{server.path}"
        self.asked = 0  # bytes that clients have sent
        self.connections = 0
        self._free: int | None = None  # bytes that a new connection may answer before it stalls
        self._to = server.address
        self._listener = listener
        self._passing = threading.Event()  # of the connections that come: set while answers pass
        self._passing.set()
        self._held: list[threading.Event] = []
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def stall(self, *, new_after: int | None = None) -> None:
        """Hold back all answers over the present connections; over those that come, after `new_after` bytes."""
        self._passing.clear()
        self._held.append(self._passing)
        self._free = new_after
        if new_after is None:
            self._passing = threading.Event()
            self._passing.set()

    def release(self) -> None:
        """Deliver what was held back."""
        self._free = None
        for passing in self._held:
            passing.set()

    def accept(self) -> None:
        """Serve clients until the listener is shut down."""
        with contextlib.suppress(OSError):
            while True:
                near = self._listener.accept()[0]
                self.connections += 1
                self._sockets.append(near)
                try:
                    far = socket.create_connection(self._to)
                except OSError:
                    near.close()
                    continue
                self._sockets.append(far)
                self._start(self._requests, near, far)
                self._start(self._answers, near, far, self._passing, self._free or 0)

    def close(self) -> None:
        """Cut all connections."""
        self._listener.shutdown(socket.SHUT_RDWR)
        for end in self._sockets:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self.release()
        for thread in self._threads:
            thread.join()
        for end in self._sockets:
            end.close()

    def _start(self, copy: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=copy, args=args)
        self._threads.append(thread)
        thread.start()

    def _requests(self, near: socket.socket, far: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := near.recv(1 << 16):
                far.sendall(data)
                self.asked += len(data)
        with contextlib.suppress(OSError):
            far.shutdown(socket.SHUT_WR)

    def _answers(self, near: socket.socket, far: socket.socket, passing: threading.Event, free: int) -> None:
        with contextlib.suppress(OSError):
            while data := far.recv(1 << 16):
                near.sendall(data[:free])
                data, free = data[free:], max(0, free - len(data))
                if data:
                    passing.wait()
                    near.sendall(data)
        with contextlib.suppress(OSError):
            near.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def link(server: Server) -> Iterator[Link]:
    """A link to `server` for the length of the block."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        made = Link(server, listener)
        thread = threading.Thread(target=made.accept)
        thread.start()
        try:
            yield made
        finally:
            made.close()
            thread.join()
