"""A live migration step by step, as a manager does it that knows QMP only."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from tests.harness.hang import HANG_SECONDS

from .machine import Machine


class Times(NamedTuple):
    """When what happened, in seconds of the host's clock as QEMU's events tell it."""

    begun: float
    stopped: float  # the guest, at the source
    resumed: float  # the guest, at the destination
    completed: float  # the source has nothing any more that the destination lacks

    @property
    def down_ms(self) -> float:
        return (self.resumed - self.stopped) * 1000


def prepare(source: Machine, destination: Machine, *, postcopy: bool = False) -> None:
    """Capabilities on both sides."""
    for side in (source, destination):
        wanted = {"events": True, "pause-before-switchover": True, "postcopy-ram": postcopy}
        if side is destination:
            del wanted["pause-before-switchover"]
        states = [{"capability": name, "state": state} for name, state in wanted.items()]
        side.qmp.execute("migrate-set-capabilities", capabilities=states)


def begin(source: Machine, destination: Machine, *, postcopy: bool = False, uri: str = "") -> float:
    """Starts it and returns when the guest is stopped at the source with its disk written ("pre-switchover").

    `uri`: where the destination listens already, else it listens at a Unix socket.
    """
    if not uri:
        uri = f"unix:{destination.qmp_path.with_name('migration')}"
        destination.qmp.execute("migrate-incoming", uri=uri)
    begun = time.time()
    source.qmp.execute("migrate", uri=uri)
    if postcopy:
        await_status(source, "active")
        source.qmp.execute("migrate-start-postcopy")
    await_status(source, "pre-switchover")
    return begun


def switch(source: Machine, destination: Machine, begun: float) -> Times:
    """Lets the source go on after "pre-switchover"; returns when the guest runs at the destination."""
    source.qmp.execute("migrate-continue", state="pre-switchover")
    resumed = await_event(destination, lambda event: event["event"] == "RESUME")
    completed = await_status(source, "completed")
    stopped = max(stamp(event) for event in source.history if event["event"] == "STOP")
    return Times(begun, stopped, stamp(resumed), stamp(completed))


def await_status(machine: Machine, status: str) -> dict[str, Any]:
    """The event that a migration has reached this status. Raises AssertionError if it fails instead."""

    def reached(event: dict[str, Any]) -> bool:
        if event["event"] != "MIGRATION":
            return False
        found = event["data"]["status"]
        if found == "failed" and status != "failed":
            raise AssertionError(f"{machine.qmp.execute('query-migrate')}\n{machine.output()}")
        return bool(found == status)

    return await_event(machine, reached)


def await_event(machine: Machine, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The next event that is wanted; those before it are kept in the machine's history."""
    deadline = time.monotonic() + HANG_SECONDS
    while time.monotonic() < deadline:
        event = machine.qmp.event(deadline - time.monotonic())
        if event is not None:
            machine.history.append(event)
            if wanted(event):
                return event
    raise TimeoutError(f"no such event from QEMU; it said {machine.history}")


def stamp(event: dict[str, Any]) -> float:
    """When QEMU sent an event."""
    at = event["timestamp"]
    return float(at["seconds"] + at["microseconds"] / 1e6)
