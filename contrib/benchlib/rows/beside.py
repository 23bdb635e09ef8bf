"""A reader beside the stream on a fast link, `cmp` of the whole image: what is fetched twice."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from functools import partial

from .. import ours
from ..figures import MIB
from ..lab import Lab, Origin
from ..usage import Meter
from ..values import FRUGAL, QEDFS, Contenders, Outcome, Row, Unit

_SECONDS = 300.0


def _ours(lab: Lab, origin: Origin) -> Outcome:
    with ours.cold(lab, origin, stream=True) as (mount, image):
        meter = Meter(mount.pid)
        subprocess.run(["cmp", image, lab.base(origin.size)], check=True, timeout=_SECONDS)
        mount.wait(image.name)
        seconds, figures = meter.read(origin.size)
    return Outcome(seconds, figures | origin.traffic.figures(origin.size))


@contextlib.contextmanager
def _prepare(lab: Lab, kind: str) -> Iterator[Contenders]:
    with lab.origin(kind, lab.pick(1024 * MIB, 256 * MIB)) as origin:
        yield {QEDFS: partial(_ours, lab, origin)}


ROWS = tuple(
    Row(
        f"cmp-{kind}",
        f"cmp of the mount beside the stream, loopback, {kind.upper()}, until complete",
        Unit.SECONDS,
        partial(_prepare, kind=kind),
        FRUGAL,
    )
    for kind in ("http", "nbd")
)
