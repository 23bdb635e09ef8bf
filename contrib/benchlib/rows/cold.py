"""Reads of an image of which nothing is there yet, 20 ms away: in order, at random, and beside the stream."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from .. import bounded, fio, ours, peers, qemu
from ..figures import GIB, MIB
from ..lab import Lab, Origin
from ..values import FRUGAL, LIMIT, NBDKIT, QEDFS, QEMU, Contenders, Outcome, Row, Target, Unit

_RTT_MS = 20
_DD_SECONDS = 300.0
_CLUSTER_SIZE = 65536
_DEPTH_1 = "qedfs depth 1"
_STREAM_OFF = "stream off"

# The path of a cold image that is there for the length of a block.
Cold = Callable[[Lab, Origin], AbstractContextManager[Path]]


@contextlib.contextmanager
def _ours(lab: Lab, origin: Origin) -> Iterator[Path]:
    with ours.cold(lab, origin) as (_, image):
        yield image


@contextlib.contextmanager
def _qemu(lab: Lab, origin: Origin) -> Iterator[Path]:
    with qemu.cold_overlay(lab, origin) as overlay, qemu.exported(lab, overlay) as (_, image):
        yield image


def _dd(lab: Lab, cold: Cold, origin: Origin, of_size: int) -> Outcome:
    with cold(lab, origin) as image:
        began = time.monotonic()
        bounded.run(["dd", f"if={image}", "of=/dev/null", "bs=1M", "status=none"], _DD_SECONDS)
        seconds = time.monotonic() - began
    return Outcome(origin.size / seconds / 1e6, origin.traffic.figures(origin.size), scaled=origin.size < of_size)


def _in_order(kind: str) -> Row:
    @contextlib.contextmanager
    def prepare(lab: Lab) -> Iterator[Contenders]:
        size = lab.pick(GIB, 512 * MIB)
        # The rates of the others do not change with the length, and are low.
        piece = lab.pick(128 * MIB, 64 * MIB)
        with lab.origin(kind, size, _RTT_MS) as origin, lab.origin(kind, piece, _RTT_MS) as small:
            yield {
                QEDFS: partial(_dd, lab, _ours, origin, size),
                QEMU: partial(_dd, lab, _qemu, small, size),
                NBDKIT: partial(_dd, lab, peers.copying, small, size),
                LIMIT: partial(peers.link_rate, lab, origin),
            }

    return Row(
        f"dd-{kind}",
        f"dd of a cold image through the mount, {_RTT_MS} ms, {kind.upper()}",
        Unit.MB_PER_SECOND,
        prepare,
        (Target(0.9, LIMIT), *FRUGAL),
        note="qedfs without its stream; QEMU's FUSE export without copy-on-read; nbdkit with cow-on-read and nbdfuse",
    )


def _fio(lab: Lab, cold: Cold, origin: Origin, depth: int, seconds: int) -> fio.Report:
    with cold(lab, origin) as image:
        return fio.run(image, fio.Job("randread", 4096, depth, seconds, stride=_CLUSTER_SIZE))


def _latency(lab: Lab, cold: Cold, origin: Origin, seconds: int) -> Outcome:
    report = _fio(lab, cold, origin, 1, seconds)
    return Outcome(report.mean_ms, _figures(report, origin))


def _rate(lab: Lab, cold: Cold, origin: Origin, depth: int, seconds: int) -> Outcome:
    report = _fio(lab, cold, origin, depth, seconds)
    return Outcome(report.iops, _figures(report, origin))


def _figures(report: fio.Report, origin: Origin) -> dict[str, float]:
    return {"p99 ms": report.p99_ms, **origin.traffic.figures(report.operations * _CLUSTER_SIZE)}


def _at_random(kind: str) -> Row:
    @contextlib.contextmanager
    def prepare(lab: Lab) -> Iterator[Contenders]:
        seconds = lab.pick(10, 3)
        with lab.origin(kind, GIB, _RTT_MS) as origin:
            yield {
                QEDFS: partial(_latency, lab, _ours, origin, seconds),
                QEMU: partial(_latency, lab, _qemu, origin, seconds),
                LIMIT: partial(peers.round_trips, origin, seconds),
            }

    return Row(
        f"cold-4k-d1-{kind}",
        f"4 KiB random reads of a cold image, {_RTT_MS} ms, depth 1, {kind.upper()}",
        Unit.MILLISECONDS,
        prepare,
        (Target(1.15, LIMIT),),
        note="limit: requests for 4 KiB one after the other, that is the round trip; wire/needed counts whole clusters",
    )


def _at_random_deep(kind: str) -> Row:
    @contextlib.contextmanager
    def prepare(lab: Lab) -> Iterator[Contenders]:
        seconds = lab.pick(10, 3)
        with lab.origin(kind, GIB, _RTT_MS) as origin:
            yield {
                QEDFS: partial(_rate, lab, _ours, origin, 16, seconds),
                _DEPTH_1: partial(_rate, lab, _ours, origin, 1, seconds),
                QEMU: partial(_rate, lab, _qemu, origin, 16, seconds),
            }

    return Row(
        f"cold-4k-d16-{kind}",
        f"the same, depth 16, {kind.upper()}",
        Unit.IOPS,
        prepare,
        (Target(8, _DEPTH_1),),
    )


def _beside_the_stream(lab: Lab, origin: Origin, seconds: int, *, stream: bool) -> Outcome:
    with ours.cold(lab, origin, stream=stream) as (mount, image):
        before = mount.image()["populated"]
        # The stream begins at the front: what is read lies where it will not get to.
        job = fio.Job("randread", _CLUSTER_SIZE, 1, seconds, stride=_CLUSTER_SIZE, offset=origin.size // 2)
        report = fio.run(image, job)
        kept = mount.image()["populated"] - before - report.operations * _CLUSTER_SIZE
    return Outcome(report.p99_ms, {"mean ms": report.mean_ms, "streamed MB/s": max(0, kept) / seconds / 1e6})


@contextlib.contextmanager
def _prepare_beside(lab: Lab) -> Iterator[Contenders]:
    seconds = lab.pick(15, 5)
    with lab.origin("http", lab.pick(4 * GIB, 2 * GIB), _RTT_MS) as origin:
        yield {
            QEDFS: partial(_beside_the_stream, lab, origin, seconds, stream=True),
            _STREAM_OFF: partial(_beside_the_stream, lab, origin, seconds, stream=False),
        }


ROWS = (
    _in_order("http"),
    _in_order("nbd"),
    _at_random("http"),
    _at_random("nbd"),
    _at_random_deep("http"),
    _at_random_deep("nbd"),
    Row(
        "p99-streaming",
        f"p99 of cold 64 KiB random reads with the stream on, {_RTT_MS} ms, HTTP",
        Unit.MILLISECONDS,
        _prepare_beside,
        (Target(1.3, _STREAM_OFF),),
    ),
)
