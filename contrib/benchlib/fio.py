"""fio on one file or NBD export: a job's rate and latencies."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.harness.require import require

from . import bounded

# Beyond what the job itself may take: a mount that hangs must not hang the bench.
_GRACE_SECONDS = 60.0
_SEED = 1


@dataclasses.dataclass(frozen=True)
class Job:
    """What fio does; `pattern` is its `rw`. Without `stride` it goes on for `seconds`.

    `stride` (of a file): the positions are multiples of it in a shuffled order, the same in each run. None comes twice,
    so the job may end before its time.
    """

    pattern: str
    block_size: int
    depth: int = 1
    seconds: float = 5
    direct: bool = True
    stride: int = 0
    offset: int = 0  # where the first of these positions is
    sync: str = ""  # "fsync" or "fdatasync" after each write


@dataclasses.dataclass(frozen=True)
class Report:
    """What fio measured: operations, operations and bytes per second, latencies from submission in milliseconds."""

    operations: int
    iops: float
    bytes_per_second: float
    mean_ms: float
    p99_ms: float


def run(target: Path | str, job: Job) -> Report:
    """Runs one job on a file, or on the export of an NBD URI.

    Raises:
        bounded.Failed: an I/O of the job failed, fio could not begin, or it did not end.
    """
    with _arguments(target, job) as argv:
        printed = bounded.run(argv, job.seconds + _GRACE_SECONDS)
    # fio prints notes before the JSON.
    report = json.loads(printed[printed.index("{") :])["jobs"][0]
    side = report["read" if "read" in job.pattern else "write"]
    latency = side["clat_ns"]
    return Report(
        operations=side["total_ios"],
        iops=side["iops"],
        bytes_per_second=side["bw_bytes"],
        mean_ms=latency["mean"] / 1e6,
        p99_ms=latency["percentile"]["99.000000"] / 1e6,
    )


@contextlib.contextmanager
def _arguments(target: Path | str, job: Job) -> Iterator[list[str]]:
    options: dict[str, object] = {
        "name": "job",
        "rw": job.pattern,
        "bs": job.block_size,
        "iodepth": job.depth,
        "runtime": job.seconds,
        "output-format": "json",
    }
    if isinstance(target, str):
        options |= {"ioengine": "nbd", "uri": target}
    else:
        options |= {"ioengine": "libaio" if job.direct else "psync", "direct": int(job.direct), "filename": target}
    with contextlib.ExitStack() as stack:
        if job.stride and isinstance(target, Path):
            log = stack.enter_context(tempfile.NamedTemporaryFile("w", prefix="qedfs-fio-"))
            log.write(_strides(target, job))
            log.flush()
            options["read_iolog"] = log.name
        else:
            options |= {"norandommap": 1, "time_based": 1}
        if job.sync:
            options[job.sync] = 1
        yield [require("fio"), *(f"--{name}={value}" for name, value in options.items())]


def _strides(file: Path, job: Job) -> str:
    """A list of operations for fio to replay (its "version 2 iolog"): its own random map does not work with strides."""
    places = list(range(job.offset, file.stat().st_size, job.stride))
    random.Random(_SEED).shuffle(places)
    verb = job.pattern.removeprefix("rand")
    lines = (f"{file} {verb} {pos} {job.block_size}" for pos in places)
    return "\n".join(["fio version 2 iolog", f"{file} add", f"{file} open", *lines, f"{file} close", ""])
