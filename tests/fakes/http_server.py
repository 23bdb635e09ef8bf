"""A scripted HTTP/1.1 server: serves one file rightly, or wrongly in a way that has a name.

Owns sockets and threads of its own (one per connection), so that tests of any kind can use it, and a command line:

    python -m tests.fakes.http_server --file disk.raw --port 8080 --behaviour wrong-start

`FakeHttpServer.behaviour` names what is done with the next requests and may be changed at any time;
`FakeHttpServer.queue` names behaviours for single requests to come and goes first. The behaviours themselves are in
`http_behaviours.py`.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import socket
import ssl
import threading
from types import TracebackType

from tests.fakes.http_behaviours import BEHAVIOURS, Exchange, Request


class FakeHttpServer:
    """Serves `content` at every path on a loopback address, until it is closed (a context manager does that).

    Attributes that may be changed while it runs: `content`, `etag`, `last_modified` (empty: not sent), `extra` header
    fields, `behaviour`, `queue`, `redirect_to`, `cookie`. `requests` is what came in so far, `connections` how many.
    """

    def __init__(
        self,
        content: bytes,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: ssl.SSLContext | None = None,
        behaviour: str = "ok",
    ) -> None:
        self.content = content
        self.etag = '"version-1"'
        self.last_modified = "Mon, 01 Jan 2024 00:00:00 GMT"
        self.extra: dict[str, str] = {}
        self.behaviour = behaviour
        self.queue: collections.deque[str] = collections.deque()
        self.redirect_to = ""
        self.cookie = "pass=canary"
        self.requests: list[Request] = []
        self.connections = 0
        self.asked = threading.Event()  # a request has come
        self.closing = threading.Event()
        self._tls = tls
        self._threads: list[threading.Thread] = []
        self._socks: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._listener = socket.create_server((host, port), backlog=256)
        self.host = host
        self.port: int = self._listener.getsockname()[1]
        self._acceptor = threading.Thread(target=self._accept, name="fake-http", daemon=True)
        self._acceptor.start()

    def url(self, path: str = "/disk.raw", *, host: str = "", userinfo: str = "") -> str:
        """The URL of a path on this server."""
        scheme = "http" if self._tls is None else "https"
        return f"{scheme}://{userinfo + '@' if userinfo else ''}{host or self.host}:{self.port}{path}"

    def close(self) -> None:
        """Drop all connections and wait for the threads. A second call does nothing."""
        if self.closing.is_set():
            return
        self.closing.set()
        self._listener.shutdown(socket.SHUT_RDWR)  # on Linux this ends the accept in the other thread
        self._acceptor.join()
        self._listener.close()
        with self._lock:
            for sock in self._socks:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> FakeHttpServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _accept(self) -> None:
        while not self.closing.is_set():
            try:
                sock, _address = self._listener.accept()
            except OSError:
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.connections += 1
            with self._lock:
                self._socks.add(sock)
            thread = threading.Thread(target=self._serve, args=(sock, self.connections), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket, number: int) -> None:
        plain = sock
        # A client that hangs up, or speaks no TLS, is nothing to report.
        with contextlib.suppress(OSError, ValueError):
            if self._tls is not None:
                sock = self._tls.wrap_socket(plain, server_side=True)
                with self._lock:
                    self._socks.discard(plain)
                    self._socks.add(sock)
            self._serve_requests(sock, number)
        with self._lock:
            self._socks.discard(sock)
            self._socks.discard(plain)
        sock.close()
        plain.close()

    def _serve_requests(self, sock: socket.socket, number: int) -> None:
        received = b""
        while not self.closing.is_set():
            while b"\r\n\r\n" not in received:
                data = sock.recv(65536)
                if not data:
                    return
                received += data
            head, _, received = received.partition(b"\r\n\r\n")
            exchange = Exchange(self, _parse(head, number), sock)
            with self._lock:
                self.requests.append(exchange.request)
                name = self.queue.popleft() if self.queue else self.behaviour
            self.asked.set()
            BEHAVIOURS[name](exchange)
            if not exchange.keep_alive:
                return


def _parse(head: bytes, connection: int) -> Request:
    first, *lines = head.decode("latin-1").split("\r\n")
    method, path, _version = first.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return Request(method, path, headers, connection)


def main() -> None:
    """Serve a file until interrupted."""
    parser = argparse.ArgumentParser(description="Serve one file over HTTP, rightly or in a named wrong way.")
    parser.add_argument("--file", required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--behaviour", choices=sorted(BEHAVIOURS), default="ok")
    options = parser.parse_args()
    with open(options.file, "rb") as file:
        content = file.read()
    with FakeHttpServer(content, port=options.port, behaviour=options.behaviour) as server:
        print(server.url(), flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
