"""The state behind one control socket: the mount, its clients, the progress rates, the jobs.

Owns the task that samples progress, and the delivery of events to all clients. Must not know any command; a command
gets this state as a part of its `Call`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import trio

from qedfs import __version__
from qedfs.control.monitoring.progress_rate import SAMPLE_SECONDS, Rate
from qedfs.control.port import Mounted, ServedImage
from qedfs.control.qmp.jobs import Jobs
from qedfs.control.qmp.outages import Outages
from qedfs.control.qmp.releases import Releases
from qedfs.control.qmp.session import QmpSession
from qedfs.control.qmp.wire import encode
from qedfs.host.beat import next_beat

# The version of QEMU whose QMP we implement. Some clients compare versions before they use a command.
QEMU_VERSION = {"major": 7, "minor": 2, "micro": 0}
IDLE_SECONDS = 1.0  # between two looks for new images, while all are complete


class Control:
    """The state behind one control socket."""

    def __init__(self, mount: Mounted, socket: str) -> None:
        self.mount = mount
        self.socket = socket
        self.sessions: set[QmpSession] = set()
        self.rates: dict[str, Rate] = {}
        self.jobs = Jobs(mount, self.emit)
        self._outages = Outages(self.emit)
        self.releases = Releases(self.emit)

    def version(self) -> dict[str, Any]:
        """The version in `query-version` and in the greeting."""
        return {"qemu": dict(QEMU_VERSION), "package": f"qedfs-{__version__}"}

    def greeting(self) -> dict[str, Any]:
        """The first message to every client."""
        return {"QMP": {"version": self.version(), "capabilities": []}}

    def emit(self, name: str, data: dict[str, Any]) -> None:
        """Send an event to every client that has finished the negotiation."""
        now = time.time_ns() // 1000
        stamp = {"seconds": now // 1_000_000, "microseconds": now % 1_000_000}
        line = encode({"timestamp": stamp, "event": name, "data": data})
        for session in list(self.sessions):
            session.post(line)

    async def watch(self) -> None:
        """Sample the progress of every image that is not complete every SAMPLE_SECONDS, until cancelled."""
        while True:
            self.jobs.sync()
            # The others, which are most images of a large mount, make no more progress.
            lacking = [one for one in self.mount.everything() if one.image is not None and not one.image.complete]
            self._sample(lacking)
            self._outages.sync(lacking)
            self.releases.sync(self.mount.released())
            await next_beat(SAMPLE_SECONDS if lacking else IDLE_SECONDS)

    def _sample(self, lacking: Sequence[ServedImage]) -> None:
        now, sampled = trio.current_time(), set[str]()
        for found in lacking:
            job = found.job
            if job is not None and job.image.counted:
                self.rates.setdefault(found.path, Rate()).note(now, job.moved)
                sampled.add(found.path)
        for path in self.rates.keys() - sampled:
            del self.rates[path]


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """The context of one command: the control state, and the session that sent it."""

    control: Control
    session: QmpSession
