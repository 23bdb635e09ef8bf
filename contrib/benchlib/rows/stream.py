"""The whole image into an overlay: over loopback, and over links of 20 and 200 ms."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

from .. import ours, peers, qemu
from ..figures import GIB, MIB
from ..lab import RATE_BYTES, Lab
from ..values import FRUGAL, LIMIT, QEDFS, QEMU, Contenders, Row, Target, Unit


def _loopback(kind: str, target: float) -> Row:
    @contextlib.contextmanager
    def prepare(lab: Lab) -> Iterator[Contenders]:
        with lab.origin(kind, GIB) as origin:
            yield {
                QEDFS: partial(ours.fill, lab, origin),
                QEMU: partial(qemu.fill, lab, origin),
                LIMIT: partial(peers.download, lab, origin),
            }

    return Row(
        f"stream-{kind}",
        f"stream 1 GiB, loopback, {kind.upper()}",
        Unit.MB_PER_SECOND,
        prepare,
        (Target(target, QEMU), *FRUGAL),
        note=f"limit: {'curl' if kind == 'http' else 'nbdcopy'} into a file, synced",
    )


def _long_link(kind: str, rtt_ms: int, target: float) -> Row:
    @contextlib.contextmanager
    def prepare(lab: Lab) -> Iterator[Contenders]:
        size = lab.pick(GIB, 512 * MIB)
        # QEMU asks for one piece after the other: its rate is that of any part of the image.
        piece = lab.pick(128 * MIB, 64 * MIB) if rtt_ms < 100 else lab.pick(32 * MIB, 16 * MIB)
        with lab.origin(kind, size, rtt_ms) as origin, lab.origin(kind, piece, rtt_ms) as small:
            yield {
                QEDFS: partial(ours.fill, lab, origin),
                QEMU: partial(qemu.fill, lab, small, of_size=size),
                LIMIT: partial(peers.link_rate, lab, origin),
            }

    return Row(
        f"stream-{kind}-{rtt_ms}ms",
        f"stream 1 GiB, {rtt_ms} ms at 1 Gbit/s, {kind.upper()}",
        Unit.MB_PER_SECOND,
        prepare,
        (Target(target, LIMIT), *FRUGAL),
        note=f"limit: {'curl, eight ranges at once,' if kind == 'http' else 'nbdcopy'} to nowhere; "
        f"the link carries {RATE_BYTES / 1e6:g} MB/s",
    )


ROWS = (
    _loopback("http", 3.0),
    _loopback("nbd", 2.0),
    _long_link("http", 20, 0.95),
    _long_link("nbd", 20, 0.95),
    _long_link("http", 200, 0.85),
    _long_link("nbd", 200, 0.85),
)
