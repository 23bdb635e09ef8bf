"""What a server was asked for: bytes, requests, and the clusters that were asked for more than once.

The servers' own logs are read (nginx's access log, nbdkit's log filter), not the contenders' counters.

A source that tells nothing of its version, as NBD, is compared by blocks: each further connection reads some blocks of
4 KiB again that an earlier one has brought, so that no overlay is filled from two versions (`qedfs/source/samples.py`).
These are counted for themselves: no cluster is fetched twice by that.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from qedfs.source.samples import BLOCK_BYTES
from tests.harness.servers import Nginx

from .figures import COMPARED, KIB, TWICE, WIRE

CLUSTER_SIZE = 65536

Ask = tuple[int, int]  # first byte, size

_NBD_READ = re.compile(r" Read id=\d+ offset=0x([0-9a-f]+) count=0x([0-9a-f]+)")
_HTTP_RANGE = re.compile(r"bytes=(\d+)-")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """A server's log. Call `mark` before a run and `figures` after it."""

    asks: Callable[[], Sequence[Ask]]
    forget: Callable[[], None]

    def figures(self, needed_size: int) -> dict[str, float]:
        """Bytes sent per byte needed, clusters sent more than once, blocks compared, and the number of requests."""
        asks = self.asks()
        sent = sum(size for _, size in asks)
        compared = compared_size(asks)
        return {
            WIRE: sent / needed_size,
            TWICE: (repeated_size(asks) - compared) // CLUSTER_SIZE,
            COMPARED: compared // KIB,
            "requests": len(asks),
        }


def repeated_size(asks: Sequence[Ask]) -> int:
    """How many bytes were asked for again after they had been asked for once."""
    sent = repeated = end = 0
    for pos, size in sorted(asks):
        sent += size
        repeated += max(0, min(end, pos + size) - pos)
        end = max(end, pos + size)
    return repeated


def compared_size(asks: Sequence[Ask]) -> int:
    """How many bytes were asked for to compare versions: single blocks of what a larger request has asked for."""
    known = {block for pos, size in asks if size > BLOCK_BYTES for block in range(pos, pos + size, BLOCK_BYTES)}
    return sum(size for pos, size in asks if size == BLOCK_BYTES and pos in known)


def http_traffic(server: Nginx) -> Traffic:
    """From the access log; the size is what was sent, which a client that hangs up may have cut short."""

    def asks() -> list[Ask]:
        found = []
        for request in server.requests():
            match = _HTTP_RANGE.match(request.range)
            found.append((int(match[1]) if match else 0, request.body_size))
        return found

    return Traffic(asks, server.forget)


def nbd_traffic(log: Path) -> Traffic:
    """From the file of nbdkit's log filter (nbdkit-log-filter(1))."""

    def asks() -> list[Ask]:
        return [(int(pos, 16), int(size, 16)) for pos, size in _NBD_READ.findall(log.read_text())]

    def forget() -> None:
        # nbdkit appends (O_APPEND): what it writes next lands at the new beginning.
        with log.open("r+") as file:
            file.truncate(0)

    return Traffic(asks, forget)
