"""Real servers of disk images, each a context manager: nginx, nbdkit, qemu-nbd, qemu-storage-daemon, a slow link.

A server listens on 127.0.0.1 or on a Unix socket, accepts when the `with` block begins, and has ended, by its pid,
when the block is left. Its private files live in a short temporary folder: a Unix socket's path is at most 107 bytes
long, and pytest's folders are not short.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .process import Child, free_port, listening
from .require import require
from .tls import Certificate, put_group

Address = tuple[str, int] | Path

WAN = Path(__file__).parents[2] / "contrib" / "wan"

_SOCKET_NAME = "socket"


class Server:
    """A running server: where it is reached, its process, and the ways in which it can go away and come back."""

    def __init__(self, argv: Sequence[str | Path], address: Address, scheme: str, path: str, folder: Path) -> None:
        self.argv = argv
        self.address = address
        self.scheme = scheme
        self.path = path
        self.folder = folder
        self._child = self._start()

    @property
    def url(self) -> str:
        """Where clients find it: `http://127.0.0.1:PORT`, `nbd://127.0.0.1:PORT/EXPORT`, `nbd+unix:///EXPORT?socket=PATH`."""
        if isinstance(self.address, Path):
            return f"{self.scheme}+unix://{self.path or '/'}?socket={self.address}"
        return f"{self.scheme}://{self.address[0]}:{self.address[1]}{self.path}"

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._child.returncode

    def output(self) -> str:
        """All that the server printed so far."""
        return self._child.output()

    def stop(self) -> None:
        """Ends it in its own orderly way; its address stays reserved for `restart`."""
        self._child.stop()

    def kill(self) -> None:
        """SIGKILL: connections are reset, nothing is said."""
        self._child.kill()

    def restart(self) -> None:
        """Starts it again at the same address, with the same arguments; a running one is stopped first."""
        self.stop()
        self._child = self._start()

    def _start(self) -> Child:
        if isinstance(self.address, Path):
            # What a killed server leaves behind.
            self.address.unlink(missing_ok=True)
        child = Child(self.argv, self.folder / "output")
        try:
            child.wait_until(lambda: listening(self.address), "a listening socket")
        except BaseException:
            child.kill()
            raise
        return child


@dataclass(frozen=True)
class Request:
    """One line of nginx's access log."""

    method: str
    uri: str
    status: int
    body_size: int
    range: str
    if_range: str
    if_match: str
    connection: int


_LOG_FORMAT = (
    '{"method":"$request_method","uri":"$request_uri","status":$status,"body_size":$body_bytes_sent,"range":"$http_range",'
    '"if_range":"$http_if_range","if_match":"$http_if_match","connection":$connection}'
)

# One process: it may be killed without leaving a worker behind, and it reads pytest's private folders.
_NGINX_CONFIG = """
daemon off;
master_process off;
pid {folder}/pid;
error_log stderr warn;
events {{ worker_connections 512; }}
http {{
    log_format request escape=json '{log_format}';
    access_log {folder}/access request;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    default_type application/octet-stream;
    sendfile on;
    tcp_nodelay on;
    keepalive_requests 1000000;
    {http}
    server {{
        listen 127.0.0.1:{port}{listen};
        root {root};
        {server}
        location / {{ {location} }}
    }}
}}
"""


class Nginx(Server):
    """A running nginx and what it noted about each request it answered.

    nginx writes the note after the last byte was sent: the client may be a moment ahead of it.
    """

    def requests(self) -> list[Request]:
        """The requests answered so far, in the order in which they ended."""
        lines = (self.folder / "access").read_text().splitlines()
        return [Request(**json.loads(line)) for line in lines]

    def body_bytes(self) -> int:
        """Bytes of all bodies sent."""
        return sum(request.body_size for request in self.requests())

    def ranges(self) -> list[str]:
        """The Range header of each request that had one (`bytes=0-65535`)."""
        return [request.range for request in self.requests() if request.range]

    def forget(self) -> None:
        """Empties the log, so that what follows is counted from nothing."""
        with (self.folder / "access").open("r+") as log:
            log.truncate(0)


@contextlib.contextmanager
def nginx(
    root: Path,
    *,
    https: Certificate | None = None,
    http2: bool = False,
    location: str = "",
    server: str = "",
    http: str = "",
) -> Iterator[Nginx]:
    """Serves the files of `root`; `location`, `server` and `http` are directives put into the block of that name."""
    with _folder() as folder:
        port = free_port()
        if https is not None:
            server += f"\nssl_certificate {https.cert}; ssl_certificate_key {https.key};"
        config = folder / "nginx.conf"
        config.write_text(
            _NGINX_CONFIG.format(
                folder=folder,
                log_format=_LOG_FORMAT,
                port=port,
                listen=(" ssl" if https else "") + (" http2" if http2 else ""),
                root=root.resolve(),
                location=location,
                server=server,
                http=http,
            )
        )
        argv: list[str | Path] = [require("nginx"), "-p", folder, "-e", "stderr", "-c", config]
        running = Nginx(argv, ("127.0.0.1", port), "https" if https else "http", "", folder)
        with _stopping(running):
            yield running


@contextlib.contextmanager
def nbdkit(
    *plugin: str | Path,
    filters: Sequence[str] = (),
    tcp: bool = False,
    export: str = "",
    tls: Certificate | None = None,
    verify_peer: bool = False,
    psk: Path | None = None,
) -> Iterator[Server]:
    """Serves an nbdkit plugin with its arguments: `nbdkit("memory", "1G")`, `nbdkit("file", path, filters=["delay"])`.

    Parameters of a filter are arguments too: `"rdelay=10ms"`.
    """
    with _folder() as folder:
        address = _address(folder, tcp)
        argv = [require("nbdkit"), "--foreground", *_nbdkit_listen(address)]
        argv += [f"--filter={name}" for name in filters]
        if tls is not None:
            argv += ["--tls=require", f"--tls-certificates={tls.folder}"]
        if verify_peer:
            argv.append("--tls-verify-peer")
        if psk is not None:
            argv += ["--tls=require", f"--tls-psk={psk}"]
        running = Server([*argv, *plugin], address, "nbds" if tls or psk else "nbd", _export_path(export), folder)
        with _stopping(running):
            yield running


@contextlib.contextmanager
def qemu_nbd(  # noqa: PLR0913 - its options
    file: Path,
    fmt: str = "raw",
    *,
    shared: int = 8,
    tcp: bool = False,
    export: str = "",
    writable: bool = False,
    tls: Certificate | None = None,
    verify_peer: bool = False,
    psk: Path | None = None,
) -> Iterator[Server]:
    """Serves an image file of format `fmt` to at most `shared` clients at once. Keeps running when they disconnect."""
    with _folder() as folder:
        address = _address(folder, tcp)
        argv: list[str | Path] = [require("qemu-nbd"), "--persistent", "-f", fmt, "-e", str(shared), "-x", export]
        argv += ["-k", address] if isinstance(address, Path) else ["-b", address[0], "-p", str(address[1])]
        if not writable:
            argv.append("--read-only")
        if tls is not None:
            put_group(tls.folder)
            verify = "on" if verify_peer else "off"
            argv += ["--object", f"tls-creds-x509,id=tls,endpoint=server,dir={tls.folder},verify-peer={verify}"]
            argv += ["--tls-creds", "tls"]
        if psk is not None:
            put_group(psk.parent)
            argv += ["--object", f"tls-creds-psk,id=tls,endpoint=server,dir={psk.parent}", "--tls-creds", "tls"]
        running = Server([*argv, file], address, "nbds" if tls or psk else "nbd", _export_path(export), folder)
        with _stopping(running):
            yield running


@contextlib.contextmanager
def qsd(
    file: Path, fmt: str = "raw", *, export: str = "disk", writable: bool = False, tcp: bool = False
) -> Iterator[Server]:
    """Serves an image with qemu-storage-daemon: any number of clients may share it, a writable one included."""
    with _folder() as folder:
        address = _address(folder, tcp)
        if isinstance(address, Path):
            listen = f"addr.type=unix,addr.path={address}"
        else:
            listen = f"addr.type=inet,addr.host={address[0]},addr.port={address[1]}"
        switch = "on" if writable else "off"
        read_only = "off" if writable else "on"
        argv: list[str | Path] = [
            *(require("qemu-storage-daemon"), "--nbd-server", f"{listen},max-connections=0"),
            *("--blockdev", f"driver=file,node-name=file,filename={file},read-only={read_only}"),
            *("--blockdev", f"driver={fmt},node-name=image,file=file,read-only={read_only}"),
            *("--export", f"type=nbd,id=export,node-name=image,name={export},writable={switch}"),
        ]
        running = Server(argv, address, "nbd", _export_path(export), folder)
        with _stopping(running):
            yield running


@contextlib.contextmanager
def wan(
    behind: Server,
    *,
    rtt_ms: float = 20,
    rate_mbit: float = 1000,
    up_mbit: float | None = None,
    handshake: bool = False,
) -> Iterator[Server]:
    """A long link to `behind`: its `url` is the far server's, `rtt_ms` away, with `rate_mbit` towards the client.

    `up_mbit`: towards the server; as fast as this machine if None.
    """
    there = (behind.address, behind.scheme, behind.path)
    with link_to(*there, rtt_ms=rtt_ms, rate_mbit=rate_mbit, up_mbit=up_mbit, handshake=handshake) as running:
        yield running


@contextlib.contextmanager
def link_to(
    address: Address,
    scheme: str = "nbd",
    path: str = "",
    *,
    rtt_ms: float = 20,
    rate_mbit: float = 1000,
    up_mbit: float | None = None,
    handshake: bool = False,
) -> Iterator[Server]:
    """A long link to an address at which somebody will listen, now or later. As `wan`."""
    with _folder() as folder:
        port = free_port()
        to = f"unix:{address}" if isinstance(address, Path) else "{}:{}".format(*address)
        argv: list[str | Path] = [sys.executable, WAN, "--listen", str(port), "--to", to]
        argv += ["--rtt-ms", str(rtt_ms), "--rate-mbit", str(rate_mbit)]
        if up_mbit is not None:
            argv += ["--up-mbit", str(up_mbit)]
        if handshake:
            argv.append("--handshake")
        running = Server(argv, ("127.0.0.1", port), scheme, path, folder)
        with _stopping(running):
            yield running


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="qedfs-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _stopping(server: Server) -> Iterator[None]:
    try:
        yield
    finally:
        server.stop()


def _address(folder: Path, tcp: bool) -> Address:
    return ("127.0.0.1", free_port()) if tcp else folder / _SOCKET_NAME


def _nbdkit_listen(address: Address) -> list[str | Path]:
    return ["-U", address] if isinstance(address, Path) else ["-i", address[0], "-p", str(address[1])]


def _export_path(export: str) -> str:
    return f"/{export}" if export else ""


@contextlib.contextmanager
def black_hole() -> Iterator[str]:
    """The URL of a server that accepts every connection and never sends anything."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        taken: list[socket.socket] = []

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    taken.append(listener.accept()[0])

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/disk"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for connection in taken:
                connection.close()
