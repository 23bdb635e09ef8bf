"""Kills of a command that changes an overlay which is not mounted, and what the overlay has to read as afterwards.

Before each kill a guest writes through a mount, which also compares what the last kill has left. A command that comes
to its end before the kill makes later kills come earlier, and each kill lets them come a little later.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.harness.images import first_difference, qemu_check, qemu_info
from tests.harness.mounts import mounted
from tests.harness.process import Command, Died
from tests.harness.require import require

from .kills import Broken, Overlay
from .support import Writer, opened

WRITES = 40  # of the guest before each kill
LONGEST_SECONDS = 1.0  # from the start of the first command to its kill
LATER, EARLIER = 1.02, 1.1  # the next one: so much after a kill; so many times the moment at which a command had ended


class Commands:
    """One command for one overlay, that is killed again and again.

    `words`: of the command, asked for each time. `options`: of the mounts. `backing`: what the source serves, or a
    backing of this format. `named`: what the overlay may name as its backing after a kill.
    """

    def __init__(
        self,
        overlay: Overlay,
        words: Callable[[], Sequence[str | Path]],
        backing: Path,
        *options: str | Path,
        named: Callable[[], Sequence[str]],
        fmt: str = "raw",
    ) -> None:
        self.backing = backing
        self.ended = 0  # how many came to their end
        self.kills = 0
        self._overlay = overlay
        self._words = words
        self._format = fmt
        self._options = options
        self._named = named
        self._longest = LONGEST_SECONDS

    def kill_once(self, seed: int) -> int:
        """Write, then begin the command until one is killed before its end, and compare. Returns the number of writes.

        Raises:
            Broken: the image is not what it has to be.
        """
        self._guest(seed)
        source = random.Random(seed)
        while not self._run(source.random() * self._longest, seed):
            self._guest(seed)
        return WRITES

    def _guest(self, seed: int) -> None:
        """Compare the image, and write to it."""
        overlay = self._overlay
        with mounted(overlay.path, overlay.mountpoint, "--no-stream", *self._options) as mount:
            image = mount.path("disk.raw")
            if (pos := first_difference(image, overlay.expected)) is not None:
                raise Broken(f"seed {seed}: byte {pos} in the mount is not what had been written or the origin has")
            writer = Writer(overlay.expected.stat().st_size, seed=seed)
            with opened(image) as fd, opened(overlay.expected) as other:
                for _ in range(WRITES):
                    pos, data = writer.next()
                    os.pwrite(fd, data, pos)
                    os.pwrite(other, data, pos)
            if mount.unmount() != 0:
                raise Broken(f"seed {seed}: the mount did not end well")

    def _run(self, seconds: float, seed: int) -> bool:
        """Begin the command, and kill it after this time. Returns whether it was killed. Compares in any case."""
        log = self._overlay.path.with_suffix(".log")
        command = Command(self._words(), log)
        try:
            command.wait(seconds)
        except Died:
            command.kill()
        killed = command.returncode == -9
        if not killed and command.returncode != 0:
            raise Broken(f"seed {seed}: exit code {command.returncode}: {command.output()}")
        if killed:
            self.kills += 1
            self._longest *= LATER
        else:
            self.ended += 1
            self._longest = min(self._longest, EARLIER * seconds)
        self._compare(seed)
        return killed

    def _compare(self, seed: int) -> None:
        path = self._overlay.path
        if (found := qemu_check(path)).corruptions:
            raise Broken(f"seed {seed}: qemu-img check finds {found.corruptions} corruptions")
        if (name := qemu_info(path).get("backing-filename")) not in self._named():
            raise Broken(f"seed {seed}: the overlay names {name}")
        node = {
            "driver": "qed",
            "file": {"driver": "file", "filename": str(path)},
            "backing": {"driver": self._format, "file": {"driver": "file", "filename": str(self.backing)}},
        }
        argv = [require("qemu-img"), "compare", "-F", "raw", f"json:{json.dumps(node)}", str(self._overlay.expected)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise Broken(f"seed {seed}: {done.stdout}{done.stderr}")
