"""The QMP client of the command line: synchronous, one request at a time.

Owns the connection, the negotiation and the matching of replies to requests. Turns error replies into QedfsErrors. Must
not know what a command does, nor print anything.
"""

from __future__ import annotations

import json
import math
import os
import socket
import struct
import time
from collections import deque
from types import TracebackType
from typing import Any, Self

from qedfs.errors import (
    BadOverlay,
    InUse,
    NoSpace,
    NotMounted,
    QedfsError,
    Refused,
    SourceChanged,
    SourceError,
    TimedOut,
    UsageError,
)
from qedfs.host.procfs import mount_user
from qedfs.host.runtime import SOCKET_NAME, mount_places, place_of

# A step on a dead source fails after the mount's deadline, which the user may have raised.
ANSWER_SECONDS = 600.0
CONNECT_SECONDS = 10.0
# Even after the deadline, a server that replies at once gets this much time.
LEAST_SECONDS = 1.0
RECEIVE_BYTES = 65536
_CREDENTIALS = struct.Struct("3i")  # struct ucred, unix(7)
_TIMEVAL = struct.Struct("@ll")

_BY_EXIT_CODE: dict[int, type[QedfsError]] = {
    kind.exit_code: kind
    for kind in (UsageError, BadOverlay, SourceError, SourceChanged, NoSpace, TimedOut, InUse, Refused)
}


class Gone(NotMounted):
    """The server has closed the connection: the mount has ended."""


class NotServed(NotMounted):
    """No server answers for this mountpoint."""


class Client:
    """A connection to the server of one mount. Use it as a context manager.

    `deadline`, in terms of time.monotonic(), limits every wait for a reply. Without it a wait ends after
    ANSWER_SECONDS.
    """

    peer: str = "the server of the mount"
    peer_ended: str = "the mount has ended"

    def __init__(self, connection: socket.socket) -> None:
        self.deadline = math.inf
        self._socket = connection
        self._buffer = bytearray()
        self._events: deque[dict[str, Any]] = deque()
        self._next_id = 0

    @classmethod
    def connect(cls, mountpoint: str, *, deadline: float = math.inf) -> Self:
        """Connect to the server of the mount at `mountpoint` and negotiate.

        Raises:
            NotServed: there is no server.
            TimedOut: the server does not reply.
        """
        client = cls.reach(mountpoint, deadline=deadline)
        try:
            client.negotiate()
        except Gone as exc:
            client.close()
            raise NotServed(f"{mountpoint}: no qedfs mount answers there") from exc
        except BaseException:
            client.close()
            raise
        client.deadline = deadline
        return client

    @classmethod
    def reach(cls, mountpoint: str, *, deadline: float = math.inf) -> Self:
        """Connect without negotiating, which is enough to identify the server and to notice its end. As `connect`."""
        deadline = min(deadline, time.monotonic() + CONNECT_SECONDS)
        for place in mount_places(mountpoint):
            client = cls(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            client.deadline = deadline
            try:
                with place.opened() as folder:
                    client._connect(f"/proc/self/fd/{folder}/{SOCKET_NAME}")
                if client._server_user in (0, os.getuid(), mount_user(os.fsencode(place_of(mountpoint)))):
                    return client
                client.close()
            except BlockingIOError as exc:
                client.close()
                raise TimedOut(f"{mountpoint}: the server of the mount takes no client") from exc
            except OSError:
                # No socket, a socket of a dead server, or a folder that we may not enter: try the next place.
                client.close()
            except BaseException:
                client.close()
                raise
        raise NotServed(f"{mountpoint}: no qedfs mount answers there")

    def _connect(self, path: str) -> None:
        # Not settimeout: on a non-blocking socket, connecting to a server with a full backlog fails at once.
        seconds = self._patience()
        patience = _TIMEVAL.pack(int(seconds), int(seconds % 1 * 1e6))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)
        self._socket.connect(path)

    @property
    def server_pid(self) -> int:
        """The pid of the server; 0 if it runs in a PID namespace that we cannot see."""
        return self._credentials()[0]

    @property
    def _server_user(self) -> int:
        return self._credentials()[1]

    def _credentials(self) -> tuple[int, int, int]:
        pid, uid, gid = _CREDENTIALS.unpack(
            self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        )
        return pid, uid, gid

    def negotiate(self) -> None:
        """Read the greeting and negotiate. Raises what `execute` raises."""
        self._answer(None)
        self.execute("qmp_capabilities")

    def execute(self, name: str, /, **arguments: Any) -> Any:  # noqa: ANN401 - JSON
        """Run a command and return its result. An `_` in the name of an argument stands for `-`.

        Raises:
            QedfsError: of the class that the exit code in the server's reply selects.
            Gone: the mount has ended.
            TimedOut: no reply came in time.
        """
        self._next_id += 1
        named = {key.replace("_", "-"): value for key, value in arguments.items() if value is not None}
        request = {"execute": name, "arguments": named, "id": self._next_id}
        try:
            self._socket.settimeout(self._patience())
            self._socket.sendall(json.dumps(request).encode())
        except TimeoutError as exc:
            raise TimedOut(f"{self.peer} takes no command") from exc
        except OSError as exc:
            raise Gone(self.peer_ended) from exc
        message = self._answer(self._next_id)
        if "error" in message:
            raise error_of(message["error"].get("x-qedfs-exit-code"), message["error"]["desc"])
        return message["return"]

    def _answer(self, request_id: int | None) -> dict[str, Any]:
        """The reply to a request, or the greeting for None. Events that arrive before it are queued."""
        seconds = self._patience()
        until = time.monotonic() + seconds
        while True:
            try:
                message = self._receive_line(until)
            except TimeoutError as exc:
                raise TimedOut(f"{self.peer} has given no answer for {round(seconds, 1):g} s") from exc
            if "event" in message:
                self._events.append(message)
            elif message.get("id") == request_id:
                return message

    def _patience(self) -> float:
        """Seconds to wait for the next reply at most."""
        return min(ANSWER_SECONDS, max(LEAST_SECONDS, self.deadline - time.monotonic()))

    def event(self, timeout_seconds: float) -> dict[str, Any] | None:
        """The next event, or None if none arrives in time. Raises Gone."""
        if self._events:
            return self._events.popleft()
        try:
            return self._receive_line(time.monotonic() + timeout_seconds)
        except TimeoutError:
            return None

    def go_on_with(self, other: Client) -> None:
        """Take the connection of another client, which must not be used any more, in place of this one's."""
        self._socket.close()
        self._socket, self._buffer, self._events = other._socket, other._buffer, other._events
        self._next_id = other._next_id

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _receive_line(self, deadline: float) -> dict[str, Any]:
        while (end := self._buffer.find(b"\n")) < 0:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._socket.settimeout(left)
            try:
                data = self._socket.recv(RECEIVE_BYTES)
            except ConnectionResetError:
                data = b""
            if not data:
                raise Gone(self.peer_ended)
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        message: dict[str, Any] = json.loads(line)
        return message


def error_of(exit_code: int | None, text: str) -> QedfsError:
    """The error of the class that this exit code selects."""
    return _BY_EXIT_CODE.get(exit_code or 0, QedfsError)(text)
