"""A small synchronous QMP client, for both storage daemons: QEMU's and ours (QEMU: docs/interop/qmp-spec.rst)."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ANSWER_SECONDS = 60.0


class QmpFailed(RuntimeError):
    """The server refused a command, or a job failed."""


class Qmp:
    """A connection, negotiated. Use it as a context manager."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(ANSWER_SECONDS)
        self._socket.connect(str(path))
        self._lines = self._socket.makefile("rb")
        self._events: list[dict[str, Any]] = []
        self._receive()
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: Any) -> Any:  # noqa: ANN401 - JSON
        """Runs a command; `_` in the names of arguments stands for `-`. Raises QmpFailed."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._socket.sendall(json.dumps({"execute": command, "arguments": named}).encode())
        while True:
            message = self._receive()
            if "event" in message:
                self._events.append(message)
            elif "error" in message:
                raise QmpFailed(f"{command}: {message['error']['desc']}")
            else:
                return message["return"]

    def wait_for_jobs(self, count: int, timeout_seconds: float) -> None:
        """Waits until `count` block jobs have completed.

        Raises:
            QmpFailed: one of them failed.
            TimeoutError: they take longer.
        """
        deadline = time.monotonic() + timeout_seconds
        while count:
            event = self._next_event(deadline)
            if event["event"] not in ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED"):
                continue
            data = event["data"]
            if event["event"] == "BLOCK_JOB_CANCELLED" or "error" in data:
                raise QmpFailed(f"{data['device']}: {data.get('error', 'cancelled')}")
            count -= 1

    def _next_event(self, deadline: float) -> dict[str, Any]:
        if self._events:
            return self._events.pop(0)
        self._socket.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            return self._receive()
        finally:
            self._socket.settimeout(ANSWER_SECONDS)

    def _receive(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line:
            raise QmpFailed("the server has hung up")
        message: dict[str, Any] = json.loads(line)
        return message

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lines.close()
        self._socket.close()
