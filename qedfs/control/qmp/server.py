"""The control socket of a mount: listens, checks who connects, gives each client a session.

Owns the socket file and the set of clients. Must not know any command.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
from pathlib import Path

import trio

from qedfs.control.port import Mounted
from qedfs.control.qmp.dispatch import execute
from qedfs.control.qmp.session import QmpSession
from qedfs.control.qmp.state import Control
from qedfs.control.socket_file import mark_of, remove_own
from qedfs.errors import Inaccessible, InUse
from qedfs.host.runtime import private_folder

log = logging.getLogger(__name__)

MAX_CLIENTS = 64
BACKLOG = 16
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid: struct ucred, unix(7)


async def serve_control(
    path: Path, mount: Mounted, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Serve control clients at the Unix socket `path` until cancelled. Reports `started` when it listens.

    Raises:
        InUse: another live server listens there.
        Inaccessible: the socket cannot be created.
    """
    listener = _listen(path)
    mark = mark_of(path)
    control = Control(mount, str(path))
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(control.watch)
            task_status.started()
            await _accept(listener, control, nursery)
    finally:
        listener.close()
        # Another mount may have replaced the socket. The folder stays: the lock on it shows that this mount is alive.
        remove_own(path, mark)


async def _accept(listener: trio.socket.SocketType, control: Control, nursery: trio.Nursery) -> None:
    while True:
        try:
            client, _ = await listener.accept()
        except OSError as exc:
            if exc.errno not in (errno.EMFILE, errno.ENFILE, errno.ECONNABORTED, errno.ENOMEM, errno.ENOBUFS):
                raise
            log.warning("cannot accept a control client: %s", exc.strerror)
            await trio.sleep(0.1)
            continue
        if not _is_welcome(client):
            client.close()
            continue
        if len(control.sessions) >= MAX_CLIENTS:
            _make_room(control)
        session = QmpSession(trio.SocketStream(client), execute(control))
        control.sessions.add(session)
        nursery.start_soon(_converse, session, control)


def _make_room(control: Control) -> None:
    """Drop the least active client, so that forgotten clients cannot lock their user out.

    Clients that have not negotiated go first, then the one that has been silent longest. A client whose command is
    running is dropped only if there is no other.
    """
    forgotten = min(control.sessions, key=lambda session: (session.busy, session.negotiated, session.heard_at))
    log.info("%d control clients are connected, the one that was silent longest is dropped", len(control.sessions))
    control.sessions.discard(forgotten)
    forgotten.drop()


async def _converse(session: QmpSession, control: Control) -> None:
    try:
        await session.run(control.greeting())
    except* Exception as group:
        # A bug must cost this client only, not the mount.
        log.error("a control client is dropped: internal error", exc_info=group)
    finally:
        control.sessions.discard(session)


def _is_welcome(client: trio.socket.SocketType) -> bool:
    """Whether the client runs as our user or as root. Holds even if somebody has loosened the mode of the folder."""
    credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(credentials)
    if uid in (0, os.getuid()):
        return True
    log.warning("a control client of user %d was refused", uid)
    return False


def _listen(path: Path) -> trio.socket.SocketType:
    private_folder(path.parent)
    _clear(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    old = os.umask(0o177)
    try:
        listener.bind(os.fspath(path))
        listener.listen(BACKLOG)
    except OSError as exc:
        listener.close()
        raise Inaccessible(f"{path}: cannot listen there: {exc.strerror or exc}") from exc
    finally:
        os.umask(old)
    return trio.socket.from_stdlib_socket(listener)


def _clear(path: Path) -> None:
    """Remove the socket of a dead server. Raises InUse if a live one listens."""
    if path.exists() and not path.is_socket():
        # A connection to it would be refused as if it were the socket of a dead server.
        raise Inaccessible(f"{path}: is not a socket, so the control socket cannot be made there; remove it")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except FileNotFoundError:
            return
        except BlockingIOError:
            pass  # the backlog is full, so a server is listening
        except OSError as exc:
            raise Inaccessible(f"{path}: {exc.strerror or exc}; remove it") from exc
    raise InUse(f"{path}: another mount answers there; unmount it first")
