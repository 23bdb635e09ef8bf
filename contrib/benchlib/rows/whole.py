"""What a user waits for: from typing `mount --daemon` until `wait` returns, 20 ms away."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from functools import partial

from tests.harness.mounts import qedfs

from .. import ours
from ..figures import MIB
from ..lab import Lab, Origin
from ..values import FRUGAL, LIMIT, QEDFS, Contenders, Outcome, Row, Target, Unit

_RTT_MS = 20
_LINK_BYTES_PER_SECOND = 1e9 / 8
_MOST_BEYOND_SECONDS = 0.6
BEYOND = "seconds beyond the link's"


def _ours(lab: Lab, origin: Origin) -> Outcome:
    overlay, mountpoint = ours.create(lab.fresh("whole.qed"), origin.url), lab.fresh("mnt")
    mountpoint.mkdir()
    lab.settle()
    origin.traffic.forget()
    try:
        began = time.monotonic()
        qedfs("mount", overlay, mountpoint, "--daemon")
        mounted = time.monotonic()
        qedfs("wait", mountpoint, "--quiet")
        seconds = time.monotonic() - began
    finally:
        qedfs("umount", mountpoint, "--if-mounted")
        overlay.unlink()
    figures = {"mounted after": mounted - began, BEYOND: seconds - _link_seconds(origin)}
    return Outcome(seconds, figures | origin.traffic.figures(origin.size))


def _link_seconds(origin: Origin) -> float:
    return origin.size / _LINK_BYTES_PER_SECOND


@contextlib.contextmanager
def _prepare(lab: Lab, kind: str) -> Iterator[Contenders]:
    with lab.origin(kind, lab.pick(512 * MIB, 128 * MIB), _RTT_MS) as origin:
        yield {QEDFS: partial(_ours, lab, origin), LIMIT: lambda: Outcome(_link_seconds(origin))}


ROWS = tuple(
    Row(
        f"whole-{kind}",
        f"from `mount` until `wait` returns, {_RTT_MS} ms at 1 Gbit/s, {kind.upper()}",
        Unit.SECONDS,
        partial(_prepare, kind=kind),
        (Target(_MOST_BEYOND_SECONDS, figure=BEYOND), *FRUGAL),
        note="512 MiB, 128 if quick; the limit is the size over the link's rate",
    )
    for kind in ("http", "nbd")
)
