"""A proxy whose connections can be held up: what is asked is passed on, the answers wait until they are released."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path


class Gate:
    """Listens at one Unix socket for a server at another one, which may come later."""

    def __init__(self, listener: socket.socket, server: Path) -> None:
        self._listener = listener
        self._server = server
        self._threads: list[threading.Thread] = []
        self._sockets: list[socket.socket] = []
        self._old: frozenset[socket.socket] = frozenset()
        self._released = threading.Event()

    def hold(self) -> None:
        """Answers on the connections that there are now wait, those on later ones do not."""
        self._old = frozenset(self._sockets)

    def release(self) -> None:
        """Let all answers go."""
        self._released.set()

    def serve(self) -> None:
        """Until the listener is closed."""
        with contextlib.suppress(OSError):
            while True:
                client = self._listener.accept()[0]
                there = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                try:
                    there.connect(str(self._server))
                except OSError:
                    client.close()
                    continue
                self._sockets += [client, there]
                for one, other, held in ((client, there, False), (there, client, True)):
                    thread = threading.Thread(target=self._pass, args=(one, other, held), daemon=True)
                    thread.start()
                    self._threads.append(thread)

    def close(self) -> None:
        """End everything."""
        self.release()
        for each in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        for thread in self._threads:
            thread.join()

    def _pass(self, one: socket.socket, other: socket.socket, held: bool) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(1 << 16):
                if held and one in self._old:
                    self._released.wait()
                other.sendall(data)
        with contextlib.suppress(OSError):
            other.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def gate(path: Path, server: Path) -> Iterator[Gate]:
    """One that listens at `path`."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(64)
    running = Gate(listener, server)
    thread = threading.Thread(target=running.serve)
    thread.start()
    try:
        yield running
    finally:
        running.close()
        thread.join()
