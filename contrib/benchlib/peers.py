"""The plain tools: curl and nbdcopy, which show what a link carries, and nbdkit with nbdfuse."""

from __future__ import annotations

import contextlib
import http.client
import os
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

from tests.harness.process import Child
from tests.harness.require import require
from tests.harness.servers import nbdkit

from . import bounded, fio
from .lab import Lab, Origin
from .values import Outcome

COPY_SECONDS = 300.0
_COMMAND_SECONDS = 10.0
_SMALL_SIZE = 4096
_RANGES = 8


def copy(origin: Origin, target: Path) -> None:
    """The image into a file in one go, with curl or nbdcopy."""
    if origin.http:
        argv = [require("curl"), "--silent", "--fail", "--output", str(target), origin.url]
    else:
        argv = [require("nbdcopy"), origin.url, str(target)]
    bounded.run(argv, COPY_SECONDS)


def download(lab: Lab, origin: Origin) -> Outcome:
    """The rate of such a copy until it is on the disk."""
    lab.settle()
    target = lab.fresh("copy.raw")
    try:
        began = time.monotonic()
        copy(origin, target)
        _sync(target)
        return Outcome(origin.size / (time.monotonic() - began) / 1e6)
    finally:
        target.unlink(missing_ok=True)


def link_rate(lab: Lab, origin: Origin) -> Outcome:
    """What the link carries when the bytes go nowhere: curl with several ranges at once, or nbdcopy."""
    lab.settle()
    argv = [require("nbdcopy"), origin.url, "null:"]
    if origin.http:
        # One connection holds 8 MiB under way, which at 200 ms is a third of the link.
        argv = [require("curl"), "--silent", "--fail", "--parallel"]
        part = origin.size // _RANGES
        for pos in range(0, origin.size, part):
            argv += ["--next"] if pos else []
            argv += ["--range", f"{pos}-{pos + part - 1}", "--output", "/dev/null", origin.url]
    began = time.monotonic()
    bounded.run(argv, COPY_SECONDS)
    return Outcome(origin.size / (time.monotonic() - began) / 1e6)


def round_trips(origin: Origin, seconds: float) -> Outcome:
    """Milliseconds of a request for 4 KiB on a connection that is there, one after the other."""
    if not origin.http:
        # fio speaks NBD itself.
        job = fio.Job("randread", _SMALL_SIZE, 1, seconds)
        return Outcome(fio.run(origin.url, job).mean_ms)
    url = urllib.parse.urlsplit(origin.url)
    connection = http.client.HTTPConnection(url.netloc, timeout=_COMMAND_SECONDS)
    times: list[float] = []
    deadline = time.monotonic() + seconds
    with contextlib.closing(connection):
        while time.monotonic() < deadline:
            pos = len(times) * 65536 % (origin.size - _SMALL_SIZE)
            began = time.monotonic()
            connection.request("GET", url.path, headers={"Range": f"bytes={pos}-{pos + _SMALL_SIZE - 1}"})
            connection.getresponse().read()
            times.append(time.monotonic() - began)
    # The first one connects.
    return Outcome(sum(times[1:]) / len(times[1:]) * 1000)


@contextlib.contextmanager
def copying(lab: Lab, origin: Origin) -> Iterator[Path]:
    """nbdkit with a copy-on-write layer that keeps what is read (in a temporary file), as a raw file by nbdfuse."""
    origin.traffic.forget()
    source = ("curl", origin.url) if origin.http else ("nbd", f"uri={origin.url}")
    image = lab.fresh("nbdfuse.raw")
    image.touch()
    outside = image.stat().st_dev
    with nbdkit(*source, "cow-on-read=true", filters=["cow"]) as server:
        child = Child([require("nbdfuse"), image, server.url], lab.fresh("nbdfuse.log"))
        try:
            lab.prefer(server.pid)
            lab.prefer(child.pid)
            child.wait_until(lambda: image.stat().st_dev != outside, "a mount of nbdfuse")
            yield image
        finally:
            bounded.detach(image)
            child.stop()


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(fd)
    finally:
        os.close(fd)
