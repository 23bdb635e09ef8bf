"""Serves the metrics of a mount over HTTP, at an address of the machine or at a Unix socket.

Owns the listening socket and the small part of HTTP that a scrape needs: one request per connection, limited in size
and time. Must not know what the metrics are.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import socket
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path

import trio

from qedfs.control.monitoring.metrics_address import Address
from qedfs.control.monitoring.metrics_host import hosts_of, is_ours
from qedfs.control.port import Mounted
from qedfs.control.socket_file import mark_of, remove_own
from qedfs.errors import InUse, UsageError

log = logging.getLogger(__name__)

MAX_CLIENTS = 16
MAX_REQUEST_BYTES = 8 << 10
CLIENT_SECONDS = 10.0  # for one request and its response
PATH = "/metrics"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


async def serve_metrics(
    address: Address, mount: Mounted, task_status: trio.TaskStatus[Address] = trio.TASK_STATUS_IGNORED
) -> None:
    """Serve scrapes until cancelled. Reports `started` with the actual address when it listens.

    Raises:
        UsageError: it cannot listen there.
        InUse: another process listens there.
    """
    # Imported here because it needs an extra, which `parse_address` has checked. Not at the first scrape: an upgrade of
    # the package may have replaced the files of a mount that serves.
    from qedfs.control.monitoring.metrics import exposition

    listeners = _listen_at_path(address.path) if address.path else await _listen_at_port(address)
    if address.path is None:
        address = dataclasses.replace(address, port=listeners[0].socket.getsockname()[1])
    mark = mark_of(address.path) if address.path else None
    clients = trio.CapacityLimiter(MAX_CLIENTS)

    async def serve(stream: trio.SocketStream) -> None:
        try:
            clients.acquire_nowait()
        except trio.WouldBlock:
            await trio.aclose_forcefully(stream)
            return
        try:
            await _serve_client(stream, lambda: exposition(mount), address)
        finally:
            clients.release()

    log.info("metrics at %s, path %s", address, PATH)
    try:
        task_status.started(address)
        await trio.serve_listeners(serve, listeners)
    finally:
        if address.path is not None:
            remove_own(address.path, mark)


async def _serve_client(stream: trio.SocketStream, exposed: Callable[[], bytes], address: Address) -> None:
    async with stream:
        with trio.move_on_after(CLIENT_SECONDS):
            try:
                head = await _request_head(stream)
                if head is not None:
                    await stream.send_all(_answer(head, exposed, address))
            except trio.BrokenResourceError:
                return  # the client has gone


async def _request_head(stream: trio.SocketStream) -> bytes | None:
    """The request up to its blank line, cut at MAX_REQUEST_BYTES. None if the client closes before that."""
    head = b""
    while b"\r\n\r\n" not in head and len(head) < MAX_REQUEST_BYTES:
        more = await stream.receive_some(MAX_REQUEST_BYTES - len(head))
        if not more:
            return None
        head += more
    return head


def _answer(head: bytes, exposed: Callable[[], bytes], address: Address) -> bytes:
    refusal = _refuse_request(head) or _refuse_host(head, address)
    if refusal is not None:
        return refusal
    try:
        return _response(HTTPStatus.OK, exposed())
    except Exception:
        # A bug must cost this response only, not the mount.
        log.exception("cannot make the metrics")
        return _response(HTTPStatus.INTERNAL_SERVER_ERROR)


def _refuse_request(head: bytes) -> bytes | None:
    """The response to a request that asks for anything but the metrics. RFC 9112, section 3: the request line."""
    method, _, rest = head.partition(b"\r\n")[0].partition(b" ")
    target, _, version = rest.partition(b" ")
    if b"\r\n\r\n" not in head:
        return _response(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
    if not version.startswith(b"HTTP/1."):
        return _response(HTTPStatus.BAD_REQUEST)
    if target.partition(b"?")[0] != PATH.encode():
        return _response(HTTPStatus.NOT_FOUND)
    if method != b"GET":
        return _response(HTTPStatus.METHOD_NOT_ALLOWED, extra="Allow: GET\r\n")
    return None


def _refuse_host(head: bytes, address: Address) -> bytes | None:
    """The response to a request that was meant for another host."""
    hosts = hosts_of(head)
    if len(hosts) > 1:  # RFC 9112, section 3.2
        return _response(HTTPStatus.BAD_REQUEST)
    # Browsers send no requests to Unix sockets, and none without a Host field.
    if address.path is None and hosts and not is_ours(hosts[0], address.host, socket.gethostname()):
        return _response(HTTPStatus.MISDIRECTED_REQUEST, hint=f"; ask for http://{address}{PATH}")
    return None


def _response(status: HTTPStatus, body: bytes | None = None, *, extra: str = "", hint: str = "") -> bytes:
    """A response with the metrics, or with the name of its status and a hint."""
    content_type = CONTENT_TYPE if body is not None else "text/plain"
    body = body if body is not None else f"{status.phrase}{hint}\n".encode()
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
        f"{extra}Connection: close\r\n\r\n"
    )
    return head.encode() + body


async def _listen_at_port(address: Address) -> list[trio.SocketListener]:
    try:
        return await trio.open_tcp_listeners(address.port, host=address.host)
    except OSError as exc:
        kind = InUse if exc.errno == errno.EADDRINUSE else UsageError
        raise kind(f"{address}: cannot listen there: {exc.strerror or exc}") from exc


def _listen_at_path(path: Path) -> list[trio.SocketListener]:
    """Listen at a Unix socket of mode 0600. Removes the socket of a dead server."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    old = os.umask(0o177)
    try:
        if _is_left_over(path):
            path.unlink(missing_ok=True)
        listener.bind(os.fspath(path))
        listener.listen(MAX_CLIENTS)
    except OSError as exc:
        listener.close()
        kind = InUse if exc.errno == errno.EADDRINUSE else UsageError
        raise kind(f"unix:{path}: cannot listen there: {exc.strerror or exc}") from exc
    finally:
        os.umask(old)
    return [trio.SocketListener(trio.socket.from_stdlib_socket(listener))]


def _is_left_over(path: Path) -> bool:
    if not path.is_socket():
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        return probe.connect_ex(os.fspath(path)) == errno.ECONNREFUSED
