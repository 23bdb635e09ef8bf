"""Reports the state of the mount to the service manager: ready, stopping, progress of the streams, watchdog.

Owns the protocol of sd_notify(3): lines of text in one datagram to the Unix socket that NOTIFY_SOCKET names. Without
that variable nothing is sent. Must not know what the manager does with a message. Failing to send never fails the
mount.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Mapping, Sequence

import trio

from qedfs.control.port import ServedImage
from qedfs.jobs.state import State

log = logging.getLogger(__name__)

STATUS_SECONDS = 5.0
# A healthy manager reads its socket at once. The event loop must not wait longer for one that does not.
SEND_SECONDS = 0.5


class Notifier:
    """The connection to the service manager that started the mount, if there is one."""

    def __init__(self, environment: Mapping[str, str] = os.environ, relay: Callable[[str], None] | None = None) -> None:
        """Reads NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID.

        `relay`: sends a message to the process that the manager has started, if that is not this one.
        """
        self._relay = relay
        self._address = _address(environment.get("NOTIFY_SOCKET", ""))
        self._watchdog_seconds = _watchdog_seconds(environment) if self._address else None

    def ready(self) -> None:
        """Report that the mount serves."""
        self._send("READY=1")

    def stopping(self) -> None:
        """Report that the mount has begun to stop."""
        self._send("STOPPING=1")

    async def watchdog(self) -> None:
        """Send keep-alives while the event loop runs. Returns at once if the manager's watchdog is off."""
        while self._watchdog_seconds is not None:
            self._send("WATCHDOG=1")
            # sd_watchdog_enabled(3) recommends half of the time after which the manager acts.
            await trio.sleep(self._watchdog_seconds / 2)

    async def tell_status(self, images: Callable[[], Sequence[ServedImage]]) -> None:
        """Send a line about the progress of the streams whenever it changes."""
        said = ""
        while self._address:
            line = status_line(images())
            if line != said:
                self._send(f"STATUS={line}")
                said = line
            await trio.sleep(STATUS_SECONDS)

    def _send(self, text: str) -> None:
        if not self._address:
            return
        if self._relay is not None:
            self._relay(f"notify {text}")
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.settimeout(SEND_SECONDS)
                sender.sendto(text.encode(), self._address)
        except OSError as exc:
            log.debug("cannot send %s to the service manager: %s", text, exc)


def status_line(images: Sequence[ServedImage]) -> str:
    """The progress of a mount's streams for people: "2 of 5 images complete, 40% local"."""
    jobs = [image.job for image in images if image.job is not None]
    total = sum(job.total for job in jobs)
    percent = 100 * sum(job.progress for job in jobs) // total if total else 100
    complete = sum(job.state is State.COMPLETE for job in jobs)
    broken = sum(image.error is not None for image in images if image.job is None)
    note = f", {broken} not served" if broken else ""
    return f"{complete} of {len(images)} images complete, {percent}% local{note}"


def _address(text: str) -> str:
    """The address as connect(2) takes it; "" for none, and for kinds that are not supported (vsock)."""
    if text.startswith("@"):
        return f"\0{text[1:]}"
    return text if text.startswith("/") else ""


def _watchdog_seconds(environment: Mapping[str, str]) -> float | None:
    """The manager's watchdog timeout in seconds; None if it does not watch this process."""
    try:
        microseconds = int(environment.get("WATCHDOG_USEC", "0"))
        watched = int(environment.get("WATCHDOG_PID") or os.getpid())
    except ValueError:
        return None
    return microseconds / 1e6 if microseconds > 0 and watched == os.getpid() else None
