"""Tells the service manager how the mount does: serving, stopping, how far the streams are, still alive.

Owns the protocol of sd_notify(3): lines of text in one datagram to the Unix socket that NOTIFY_SOCKET names. Without
that variable nothing is sent. Must not know what a manager does with it, and never fails for it.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Mapping, Sequence

import trio

from qedfs.control.port import ServedImage
from qedfs.jobs.stream import State

log = logging.getLogger(__name__)

STATUS_SECONDS = 5.0
# The manager reads its socket at once or is in trouble itself; then it is not worth holding the event loop.
SEND_SECONDS = 0.5


class Notifier:
    """The way to the service manager that has started us, if one has."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        """Reads NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID."""
        self._address = _address(environment.get("NOTIFY_SOCKET", ""))
        self._watchdog_seconds = _watchdog_seconds(environment) if self._address else None

    def ready(self) -> None:
        """The mount serves."""
        self._send("READY=1")

    def stopping(self) -> None:
        """It begins to stop."""
        self._send("STOPPING=1")

    async def watchdog(self) -> None:
        """Be seen alive for as long as the event loop turns; returns at once if nobody watches."""
        while self._watchdog_seconds is not None:
            self._send("WATCHDOG=1")
            # sd_watchdog_enabled(3): at half of the time after which the manager would act.
            await trio.sleep(self._watchdog_seconds / 2)

    async def tell_status(self, images: Callable[[], Sequence[ServedImage]]) -> None:
        """Say in one line how far the streams are, whenever that changes."""
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
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.settimeout(SEND_SECONDS)
                sender.sendto(text.encode(), self._address)
        except OSError as exc:
            log.debug("the service manager cannot be told %s: %s", text, exc)


def status_line(images: Sequence[ServedImage]) -> str:
    """How far the streams of a mount are, for people: "2 of 5 images complete, 40% local"."""
    jobs = [image.job for image in images if image.job is not None]
    total = sum(job.total for job in jobs)
    percent = 100 * sum(job.populated for job in jobs) // total if total else 100
    complete = sum(job.state is State.COMPLETE for job in jobs)
    broken = sum(image.error is not None for image in images if image.job is None)
    note = f", {broken} not served" if broken else ""
    return f"{complete} of {len(images)} images complete, {percent}% local{note}"


def _address(text: str) -> str:
    """The socket's address as bind(2) takes it; "" for none, or for one of a kind that we do not speak (vsock)."""
    if text.startswith("@"):
        return f"\0{text[1:]}"
    return text if text.startswith("/") else ""


def _watchdog_seconds(environment: Mapping[str, str]) -> float | None:
    """After how many seconds without a sign the manager acts; None if it does not watch this process."""
    try:
        microseconds = int(environment.get("WATCHDOG_USEC", "0"))
        watched = int(environment.get("WATCHDOG_PID") or os.getpid())
    except ValueError:
        return None
    return microseconds / 1e6 if microseconds > 0 and watched == os.getpid() else None
