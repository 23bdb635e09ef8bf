"""QMP over an address that the user names: a QEMU's monitor, or the control socket of a mount of another host.

Owns the spelling of such an address (the path of a Unix socket, or HOST:PORT), and the proof that a QEMU has ended.
Must not know commands. Who answers there is not checked: whoever may connect to a monitor of QEMU may do anything to
it, so the user has to guard it.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import select
import socket
import time
from typing import Self

from qedfs.control.qmp.client import CONNECT_SECONDS, Client, Gone
from qedfs.errors import Inaccessible, QedfsError, TimedOut, UsageError, file_error

END_SECONDS = 1.0  # between the end of a connection and that of the process
MOST_PORT = 0xFFFF
_TCP = re.compile(r"^(?:tcp:)?(\[[0-9a-fA-F:.%\w]+\]|[^/:\[\]]+):([0-9]{1,5})$")


class QemuClient(Client):
    """A connection to a QMP monitor at an address."""

    _process: int | None = None  # a pidfd of QEMU, if that is certainly who we are connected to

    @property
    def has_ended(self) -> bool:
        """Whether QEMU has certainly ended. A closed connection alone proves nothing: ssh or others may forward it."""
        return self._process is not None and bool(select.select([self._process], [], [], END_SECONDS)[0])

    def close(self) -> None:
        """Close the connection."""
        super().close()
        if self._process is not None:
            os.close(self._process)
            self._process = None

    @classmethod
    def at(cls, address: str, *, name: str | None = None) -> Self:
        """Connect and negotiate. `name` is what messages call the peer, by default "QEMU at ADDRESS".

        Raises:
            UsageError: there is no such socket.
            Inaccessible: nobody listens there, or we may not connect.
            TimedOut: no greeting comes. A QMP monitor of QEMU has one client at a time.
            QedfsError: what answers does not speak QMP.
        """
        peer = name or f"QEMU at {address}"
        connection = _connected(address, peer)
        client = cls(connection)
        client._process = _process(client.server_pid)
        client.peer, client.peer_ended = peer, f"{peer} has ended"
        client.deadline = time.monotonic() + CONNECT_SECONDS
        try:
            client.negotiate()
        except TimedOut as exc:
            client.close()
            raise TimedOut(f"{peer} sends no greeting; a monitor has one client at a time, is there another?") from exc
        except (Gone, ValueError, KeyError) as exc:
            client.close()
            raise QedfsError(f"{peer} does not speak QMP") from exc
        except BaseException:
            client.close()
            raise
        client.deadline = math.inf
        return client


def _process(pid: int) -> int | None:
    """A pidfd of this process if it is a QEMU; None if it is another program, or cannot be seen from here."""
    try:
        found = os.pidfd_open(pid)
        if os.path.basename(os.readlink(f"/proc/{pid}/exe")).startswith(("qemu", "kvm")):
            return found
        os.close(found)
    except OSError:  # as for pid 0, of a TCP connection
        pass
    return None


def _connected(address: str, peer: str) -> socket.socket:
    address = address.removeprefix("unix:")
    tcp = _TCP.match(address)
    if tcp and int(tcp[2]) > MOST_PORT:  # the C library would take its lower 16 bits
        raise UsageError(f"{peer}: {tcp[2]} is not a port; the largest is {MOST_PORT}")
    connection = None
    try:
        if tcp:
            return socket.create_connection((tcp[1].strip("[]"), int(tcp[2])), CONNECT_SECONDS)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(CONNECT_SECONDS)
        connection.connect(address)
    except OSError as exc:
        with contextlib.suppress(AttributeError):
            connection.close()  # type: ignore[union-attr]
        text = f"{peer}: cannot connect: {exc.strerror or exc}"
        raise (Inaccessible(text) if tcp else file_error(text, exc)) from exc
    return connection
