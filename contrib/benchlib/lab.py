"""The place in which the rows are measured: a work folder on a real disk, base images, servers, the length of a run.

Everything made here is gone when the bench ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import random
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.harness.servers import Server, nbdkit, nginx, wan

from .figures import MIB
from .traffic import Traffic, http_traffic, nbd_traffic

_BLOCK_SIZE = 64 * MIB
RATE_MBIT = 1000.0
RATE_BYTES = RATE_MBIT * 1e6 / 8
_SYNC_SECONDS = 120.0


@dataclasses.dataclass(frozen=True)
class Origin:
    """A base image behind a server, as a contender sees it, and what the server was asked for."""

    url: str
    size: int
    traffic: Traffic

    @property
    def http(self) -> bool:
        return self.url.startswith("http")


@dataclasses.dataclass
class Lab:
    """`quick` shortens the work of the rows to fit all of them into about five minutes; `nice` is of all contenders."""

    folder: Path
    quick: bool
    nice: int = 0
    _numbers: Iterator[int] = dataclasses.field(default_factory=itertools.count)

    @property
    def fio_seconds(self) -> int:
        """How long one fio run lasts."""
        return self.pick(5, 2)

    def pick(self, full: int, quick: int) -> int:
        """A size or a count that depends on how much time there is."""
        return quick if self.quick else full

    def fresh(self, name: str) -> Path:
        """A path in the work folder that nothing has had before."""
        return self.folder / f"{next(self._numbers)}-{name}"

    def base(self, size: int) -> Path:
        """A raw image of `size` bytes without zeros to find."""
        path = self.folder / "origin" / f"{size // MIB}.raw"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            # The same block again and again: no contender looks for repetition.
            block = random.Random(0).randbytes(_BLOCK_SIZE)
            with path.open("wb") as file:
                for pos in range(0, size, _BLOCK_SIZE):
                    file.write(block[: size - pos])
        return path

    @contextlib.contextmanager
    def origin(self, kind: str, size: int, rtt_ms: float = 0, *, image: Path | None = None) -> Iterator[Origin]:
        """Serves `image`, else a base image, over "http" (nginx) or "nbd" (nbdkit), behind a link with that delay."""
        with contextlib.ExitStack() as stack:
            image = image or self.base(size)
            server: Server
            if kind == "http":
                web = stack.enter_context(nginx(image.parent))
                server, path, traffic = web, f"/{image.name}", http_traffic(web)
            else:
                log = self.fresh("nbd.log")
                server = stack.enter_context(nbdkit("file", image, f"logfile={log}", filters=["log"], tcp=True))
                path, traffic = "", nbd_traffic(log)
            self.prefer(server.pid)
            if rtt_ms:
                server = stack.enter_context(wan(server, rtt_ms=rtt_ms, rate_mbit=RATE_MBIT))
                self.prefer(server.pid)
            yield Origin(server.url + path, size, traffic)

    def prefer(self, pid: int) -> None:
        """Gives a process that has begun a session the priority of all contenders.

        The kernel's automatic groups (sched(7)) weigh sessions against each other, whatever the nice values in them.
        """
        if self.nice:
            Path(f"/proc/{pid}/autogroup").write_text(str(self.nice))

    def settle(self) -> None:
        """Lets earlier writes reach the disk, so that the next contender does not pay for them."""
        subprocess.run(["sync", "--file-system", self.folder], check=True, timeout=_SYNC_SECONDS)


@contextlib.contextmanager
def laboratory(parent: Path, *, quick: bool, nice: int = 0) -> Iterator[Lab]:
    """A lab in a new folder below `parent`."""
    folder = Path(tempfile.mkdtemp(prefix="qedfs-bench-", dir=parent))
    try:
        lab = Lab(folder, quick, nice)
        lab.prefer(os.getpid())
        yield lab
    finally:
        # A mount that would not go is a file system of its own: nothing is deleted through it.
        subprocess.run(["rm", "-rf", "--one-file-system", folder], check=False, timeout=_SYNC_SECONDS)
