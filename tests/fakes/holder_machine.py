"""A machine for a holder, without processes: a test says what its servers do, and sees what the holder has done."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from qedfs.mount.holder_machine import Server

if TYPE_CHECKING:
    from qedfs.mount.holder_machine import Listener


class FakeMachine:
    """`done`: what the holder has done, in words. `clock`: the time in seconds. `starts`: how many it can start.

    `state`: the format that the last server was told of.
    """

    def __init__(self) -> None:
        self.clock = 1000.0
        self.done: list[str] = []
        self.logged: list[str] = []
        self.servers: list[Server] = []
        self.passed: list[tuple[Mapping[str, object], Mapping[str, str]]] = []
        self.starts = 100
        self.lingering = ""
        self.state = ""
        self.events: deque[Callable[[Listener], None]] = deque()

    def adopt(self) -> Server:
        """The first server, which runs already."""
        connection, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.close()
        other.close()
        server = Server(len(self.servers) + 1, connection, self.clock)
        self.servers.append(server)
        return server

    def now(self) -> float:
        return self.clock

    def start(self, state: str) -> Server:
        self.state = state
        if len(self.servers) >= self.starts:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        server = self.adopt()
        self.done.append(f"start {server.pid}")
        return server

    def wait(self, seconds: float, listener: Listener) -> None:
        if not self.events:
            self.clock += seconds
            return
        self.events.popleft()(listener)

    def send(self, server: Server, text: str) -> None:
        self.done.append(f"{server.pid}: {text}")

    def pass_on(self, server: Server, mount_fd: int, told: Mapping[str, object], values: Mapping[str, str]) -> None:
        self.passed.append((dict(told), dict(values)))
        self.done.append(f"{server.pid}: take")

    def kill(self, server: Server, number: int) -> None:
        self.done.append(f"kill {server.pid} {number}")

    def lingers_for(self, server: Server) -> str:
        return self.lingering

    def take_away(self, mount_fd: int, device: str) -> None:
        self.done.append(f"take away {device}")

    def notify(self, text: str) -> None:
        self.done.append(f"notify {text}")

    def log(self, text: str, level: str) -> None:
        self.logged.append(f"{level} {text}")
