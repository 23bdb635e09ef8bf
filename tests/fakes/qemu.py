"""The monitors of two QEMUs, without QEMU: what `qedfs migrate` sees of a migration, from the first word to the last.

`tests/cli/test_two_qemus.py` holds it to what real ones do. Owns where the guest runs and how far the migration is.
Must not know disks beyond `query-block`. Time does not pass here: a QEMU that has nothing to tell tells so at once.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any

from qedfs.control.qmp.client import Gone
from qedfs.control.qmp.qemu import QemuClient
from qedfs.errors import QedfsError, TimedOut


class FakeQemu(QemuClient):
    """One QEMU and the connection to its monitor."""

    def __init__(self, pair: FakePair, name: str, status: str) -> None:
        self.deadline = math.inf
        self.peer, self.peer_ended = name, f"{name} has ended"
        self.status = status  # of the guest, as query-status tells it
        self.lives = True
        self.hangs = False
        self.cut = False  # the connection is broken, which says nothing of the QEMU
        self.capabilities = {"events": False, "postcopy-ram": False, "pause-before-switchover": False}
        self.blocks: list[dict[str, Any]] = []
        self.listens = ""
        self.told: deque[dict[str, Any]] = deque()
        self.asked: list[str] = []  # the commands that came
        self._pair = pair

    @property
    def has_ended(self) -> bool:
        return not self.lives

    def execute(self, name: str, /, **arguments: Any) -> Any:
        self._check()
        self.asked.append(name)
        return self._pair.execute(self, name, arguments)

    def event(self, timeout_seconds: float) -> dict[str, Any] | None:
        self._check(silent=True)
        return self.told.popleft() if self.told else None

    def close(self) -> None:
        """Nothing is open."""

    def kill(self) -> None:
        """As SIGKILL."""
        self.lives = False
        self._pair.lost(self)

    def wait(self) -> int:
        """The exit code of a QEMU that has ended."""
        assert not self.lives
        return 0

    def tell(self, event: str, **data: Any) -> None:
        """Send an event."""
        self.told.append({"event": event, "data": data})

    def _check(self, *, silent: bool = False) -> None:
        if not self.lives or self.cut:
            raise Gone(self.peer_ended)
        if self.hangs and not silent:
            raise TimedOut(f"{self.peer} has given no answer for 1 s")


class FakePair:
    """Two QEMUs, and the migration of the guest from one to the other."""

    def __init__(self, *, listens: str = "") -> None:
        """`listens`: where the destination waits already, instead of being told."""
        self.source = FakeQemu(self, "QEMU at source", "running")
        self.destination = FakeQemu(self, "QEMU at destination", "inmigrate")
        self.destination.listens = listens
        self.slow = False  # so much memory that the migration does not get ahead
        self.stays_paused = False  # the destination was started with -S
        self.in_last_step: Callable[[], None] = lambda: None
        self.state = ""  # of the migration, as query-migrate tells it
        self._why = ""

    def execute(self, qemu: FakeQemu, name: str, arguments: dict[str, Any]) -> Any:
        """Do what a command says."""
        handler = getattr(self, "_" + name.replace("-", "_"), None)
        if handler is None:
            raise QedfsError(f"The command {name} has not been found")
        return handler(qemu, **arguments)

    def lost(self, qemu: FakeQemu) -> None:
        """One of them has died."""
        if qemu is self.destination and self.state in ("setup", "active", "device"):
            self._fail("Unable to write to socket: Broken pipe")
        elif qemu is self.destination and self.state == "postcopy-active":
            self._to("postcopy-paused")

    def _query_status(self, qemu: FakeQemu) -> dict[str, Any]:
        return {"running": qemu.status == "running", "status": qemu.status}

    def _query_block(self, qemu: FakeQemu) -> list[dict[str, Any]]:
        return qemu.blocks

    def _query_migrate(self, qemu: FakeQemu) -> dict[str, Any]:
        if qemu is not self.source or not self.state:
            return {}
        if self.state == "postcopy-active":
            self._to("completed")
        ram = {"remaining": 1 << 20, "total": 16 << 20}
        return {"status": self.state, "ram": ram, **({"error-desc": self._why} if self._why else {})}

    def _query_migrate_capabilities(self, qemu: FakeQemu) -> list[dict[str, Any]]:
        return [{"capability": name, "state": state} for name, state in qemu.capabilities.items()]

    def _migrate_set_capabilities(self, qemu: FakeQemu, capabilities: list[dict[str, Any]]) -> None:
        qemu.capabilities |= {each["capability"]: each["state"] for each in capabilities}

    def _migrate_set_parameters(self, qemu: FakeQemu, max_bandwidth: int) -> None:
        self.slow = max_bandwidth < 1 << 20

    def _migrate_incoming(self, qemu: FakeQemu, uri: str) -> None:
        if qemu.listens:
            raise QedfsError("The incoming migration has already been started")
        qemu.listens = uri

    def _migrate(self, qemu: FakeQemu, uri: str) -> None:
        self._why = ""
        self._to("setup")
        if not (self.destination.lives and uri == self.destination.listens):
            self._fail(f"Failed to connect to '{uri}': No such file or directory")
            return
        self._to("active")
        qemu.tell("MIGRATION_PASS", **{"pass": 1})
        if self.slow:
            return
        qemu.tell("MIGRATION_PASS", **{"pass": 2})
        if not qemu.capabilities["postcopy-ram"]:
            self._stop_guest()

    def _migrate_start_postcopy(self, qemu: FakeQemu) -> None:
        self._stop_guest()

    def _stop_guest(self) -> None:
        self.source.status = "finish-migrate"
        self.source.tell("STOP")
        self._to("pre-switchover")

    def _migrate_cancel(self, qemu: FakeQemu) -> None:
        if self.state not in ("setup", "active", "pre-switchover"):
            return
        self._to("cancelled")
        self.destination.lives = False
        qemu.status = "running"
        qemu.tell("RESUME")

    def _migrate_continue(self, qemu: FakeQemu, state: str) -> None:
        if self.state != state:
            raise QedfsError(f"Migration not in expected state: {self.state}")
        if not self.destination.lives:
            self._fail("Unable to write to socket: Broken pipe")
            return
        self._to("device")
        self.in_last_step()
        if self.state != "device":
            return
        self.source.status = "postmigrate"
        self._to("postcopy-active" if qemu.capabilities["postcopy-ram"] else "completed")
        self.destination.status = "paused" if self.stays_paused else "running"
        if not self.stays_paused:
            self.destination.tell("RESUME")

    def _cont(self, qemu: FakeQemu) -> None:
        if self.state in ("device", "postcopy-active", "postcopy-paused"):
            raise QedfsError("Migration is not finalized yet")
        qemu.status = "running"

    def _stop(self, qemu: FakeQemu) -> None:
        qemu.status = "paused"

    def _quit(self, qemu: FakeQemu) -> None:
        qemu.kill()

    def _fail(self, why: str) -> None:
        self._why = why
        self._to("failed")
        if self.source.status == "finish-migrate":
            self.source.status = "running"
            self.source.tell("RESUME")

    def _to(self, state: str) -> None:
        self.state = state
        self.source.tell("MIGRATION", status=state)
