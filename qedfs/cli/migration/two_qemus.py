"""A migration of a guest's memory from one QEMU to another, with a stop before the last step.

Owns the two monitors and the order of their commands (QEMU: docs/devel/migration, qapi/migration.json). With the
capability pause-before-switchover the source stops the guest, writes all that is left to its disk, says
"pre-switchover", and waits. Until `go_on`, `cancel` lets the guest run on at the source as if nothing had been. Must
not know what happens to the disk meanwhile.
"""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

from qedfs.control.qmp.client import Gone
from qedfs.control.qmp.qemu import QemuClient
from qedfs.errors import QedfsError, TimedOut, UsageError

POLL_SECONDS = 0.5
# After migrate-continue the rest of the memory and the state of the devices cross the link: what QEMU expects to take
# `downtime-limit`, 0.3 s by default. Whoever has set it higher, or has a link that stalls, waits longer.
SWITCH_SECONDS = 120.0
CANCEL_SECONDS = 30.0
END_SECONDS = 30.0
_TCP = re.compile(r"^tcp:.*:([0-9]+)$")
_BUSY = ("setup", "active", "postcopy-active", "postcopy-paused", "pre-switchover", "device", "cancelling")


class Lost(QedfsError):
    """The migration failed after the source was told to go on: the guest does not run at the destination."""


class TwoQemus:
    """The source, whose guest runs, and the destination, which waits for it."""

    def __init__(self, source: QemuClient, destination: QemuClient, uri: str, *, post_copy: bool) -> None:
        self.source = source
        self.destination = destination
        self._uri = uri
        self._post_copy = post_copy
        self.stopped_at = 0.0  # time.monotonic() when the source said that the guest stands still
        self.resumed_at = 0.0  # when the destination said that it runs

    def check(self) -> None:
        """Raise UsageError unless one runs a guest and the other one waits for one."""
        state = self.source.execute("query-status")
        if not state["running"]:
            raise UsageError(f"{self.source.peer}: its guest does not run ({state['status']})")
        status = self.source.execute("query-migrate").get("status")
        if status in _BUSY:
            raise UsageError(f"{self.source.peer}: migrates already ({status})")
        there = self.destination.execute("query-status")["status"]
        if there != "inmigrate":
            raise UsageError(f"{self.destination.peer}: waits for no migration ({there}); start it with -incoming")

    def prepare(self) -> None:
        """Set the capabilities, and let the destination listen if it does not yet (-incoming defer)."""
        wanted = {"events": True, "postcopy-ram": self._post_copy}
        _set_capabilities(self.source, {**wanted, "pause-before-switchover": True})
        _set_capabilities(self.destination, wanted)
        try:
            self.destination.execute("migrate-incoming", uri=_TCP.sub(r"tcp::\1", self._uri))
        except QedfsError as exc:
            # It was started with an address instead of "defer". No command tells that beforehand.
            if "already been started" not in str(exc):
                raise

    def start(self) -> None:
        """Begin to move the memory. The guest runs on."""
        while self.source.event(0) is not None:
            pass  # what an earlier migration has left
        self.source.execute("migrate", uri=self._uri)

    def wait_stopped(self, deadline: float, show: Callable[[dict[str, Any]], None]) -> None:
        """Return when the guest stands still at the source and its disk is written ("pre-switchover").

        `show` gets what query-migrate says, now and then. Raises QedfsError if the migration fails, TimedOut after
        `deadline`.
        """
        with _within(deadline, self.source):
            self._wait_stopped(deadline, show)

    def _wait_stopped(self, deadline: float, show: Callable[[dict[str, Any]], None]) -> None:
        asked = not self._post_copy
        while True:
            event = self.source.event(POLL_SECONDS)
            if event is not None and event["event"] == "STOP":
                self.stopped_at = time.monotonic()
            status = _status_of(event)
            if status == "pre-switchover":
                return
            if status in ("failed", "cancelled", "completed"):
                raise QedfsError(f"the migration has {status} before the guest was stopped{self._why()}")
            if event is None:
                show(self.source.execute("query-migrate"))
            # Post-copy begins after one pass over the memory: what the guest does not change is then there already.
            if not asked and event is not None and event["event"] == "MIGRATION_PASS" and event["data"]["pass"] > 1:
                self.source.execute("migrate-start-postcopy")
                asked = True
            if time.monotonic() > deadline:
                raise TimedOut(
                    "the guest's memory was not moved within the timeout; it changes faster than it is sent?"
                )

    def cancel(self) -> None:
        """Let the guest run on at the source; returns when it does. The destination's QEMU ends (before QEMU 9.1).

        Raises QedfsError if it does not run.
        """
        deadline = time.monotonic() + CANCEL_SECONDS
        with _within(deadline, self.source):
            self._cancel(deadline)

    def _cancel(self, deadline: float) -> None:
        # Refused if there is nothing to cancel, which is as good.
        with contextlib.suppress(QedfsError):
            self.source.execute("migrate_cancel")
        while not self.source.execute("query-status")["running"]:
            if time.monotonic() > deadline:
                raise QedfsError(f"{self.source.peer}: the guest stands still, although the migration was cancelled")
            if self.source.execute("query-migrate").get("status") not in _BUSY:
                # Refused while QEMU ends the migration; it lets the guest run by itself then.
                with contextlib.suppress(QedfsError):
                    self.source.execute("cont")
            self.source.event(0.05)

    def go_on(self) -> None:
        """The last step: from here on the guest belongs to the destination. Returns when it runs there.

        Raises Lost if it does not come to that.
        """
        deadline = time.monotonic() + SWITCH_SECONDS
        try:
            with _within(deadline, self.source, self.destination):
                self.source.execute("migrate-continue", state="pre-switchover")
                self._wait_running(deadline)
        except QedfsError as exc:
            raise exc if isinstance(exc, Lost) else Lost(str(exc)) from exc

    def wait_completed(self, show: Callable[[dict[str, Any]], None]) -> None:
        """Return when the source has no page of memory any more that the destination lacks.

        Raises:
            Lost: the destination has ended before that, and with it the guest.
            QedfsError: post-copy stands still; QEMU can be told to go on by hand then.
        """
        while (found := self.source.execute("query-migrate"))["status"] != "completed":
            if found["status"] in ("failed", "postcopy-paused"):
                if self._destination_has_ended():
                    raise Lost(
                        f"{self.destination.peer}: has ended while a part of the guest's memory was still at the"
                        " source, so the guest is lost as in a power cut; start it anew from the image of the mount,"
                        " and end the source's QEMU"
                    )
                raise QedfsError(
                    f"the guest runs at the destination, but a part of its memory is still at the source, and the"
                    f" migration is {found['status']}{self._why()}; QMP's migrate-recover and migrate with resume go on"
                )
            show(found)
            self.source.event(POLL_SECONDS)

    def has_failed(self) -> bool:
        """Whether the source has given the migration up. It lets the guest run on by itself then.

        False if it has sent all of the guest, and so can no longer decide what happens to it.
        """
        deadline = time.monotonic() + CANCEL_SECONDS
        with _within(deadline, self.source):
            while (status := self._status()) in _BUSY and time.monotonic() < deadline:
                self.source.event(POLL_SECONDS)
        return status in ("failed", "cancelled")

    def end_destination(self) -> bool:
        """End the destination's QEMU, in which no guest has come up. False if one has, or if that is not certain."""
        with _within(time.monotonic() + END_SECONDS, self.destination):
            try:
                if self.destination.execute("query-status")["running"]:
                    return False
                self.destination.execute("quit")
                _wait_end(self.destination)
            except Gone:
                return self.destination.has_ended
            except QedfsError:
                return False
        return True

    def _destination_has_ended(self) -> bool:
        with _within(time.monotonic() + END_SECONDS, self.destination):
            try:
                self.destination.execute("query-status")
            except Gone:
                return self.destination.has_ended
            except QedfsError:
                pass
        return False

    def quit_source(self) -> None:
        """End the source's QEMU. Its memory is free afterwards."""
        with contextlib.suppress(Gone):
            self.source.execute("quit")
        _wait_end(self.source)

    def _wait_running(self, deadline: float) -> None:
        while not self.resumed_at:
            event = self.destination.event(POLL_SECONDS)
            if event is not None and event["event"] == "RESUME":
                self.resumed_at = time.monotonic()
            elif event is None:
                self._look()
            if time.monotonic() > deadline:
                raise Lost(f"{self.destination.peer}: the guest does not run after {SWITCH_SECONDS:g} s")

    def _look(self) -> None:
        """No event has come for a while."""
        there = self.destination.execute("query-status")
        if there["running"]:
            self.resumed_at = time.monotonic()
        elif there["status"] != "inmigrate":
            # It could not take over its disk, most often: a relative path after -daemonize, or a missing permission.
            raise Lost(
                f"{self.destination.peer}: has the guest, but did not start it ({there['status']}); its log says why"
            )
        elif self.source.execute("query-migrate").get("status") in ("failed", "cancelled"):
            raise Lost(f"the migration has failed in its last step{self._why()}")

    def _status(self) -> str | None:
        status: str | None = self.source.execute("query-migrate").get("status")
        return status

    def _why(self) -> str:
        """What QEMU says of a failure, to be appended to a message."""
        reason = self.source.execute("query-migrate").get("error-desc")
        return f": {reason}" if reason else ""


@contextlib.contextmanager
def _within(deadline: float, *qemus: QemuClient) -> Iterator[None]:
    """A QEMU that gives no answer any more is given up at the deadline: the guest stands still meanwhile."""
    for qemu in qemus:
        qemu.deadline = deadline
    try:
        yield
    finally:
        for qemu in qemus:
            qemu.deadline = math.inf


def _set_capabilities(qemu: QemuClient, wanted: dict[str, bool]) -> None:
    """Only those that differ: while a QEMU listens, it refuses to be told."""
    there = {each["capability"]: each["state"] for each in qemu.execute("query-migrate-capabilities")}
    changes = [{"capability": name, "state": state} for name, state in wanted.items() if there.get(name) != state]
    if changes:
        qemu.execute("migrate-set-capabilities", capabilities=changes)


def _wait_end(qemu: QemuClient) -> None:
    """Return when QEMU has closed its monitor, which it does as one of its last acts. Raises TimedOut."""
    deadline = time.monotonic() + END_SECONDS
    with contextlib.suppress(Gone):
        while time.monotonic() < deadline:
            qemu.event(POLL_SECONDS)
        raise TimedOut(f"{qemu.peer} does not end")


def _status_of(event: dict[str, Any] | None) -> str | None:
    if event is None or event["event"] != "MIGRATION":
        return None
    status: str = event["data"]["status"]
    return status
