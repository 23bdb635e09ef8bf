"""fio on one file: a job's rate and latencies."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path

from tests.harness.require import require

# Beyond what the job itself may take: a mount that hangs must not hang the bench.
_GRACE_SECONDS = 60.0


@dataclasses.dataclass(frozen=True)
class Job:
    """What fio does; `pattern` is its `rw`. A run ends after `seconds`, or before if it has been everywhere once."""

    pattern: str
    block_size: int
    depth: int = 1
    seconds: int = 5
    direct: bool = True
    align: int = 0  # positions are multiples of it; 0: of the block size
    offset: int = 0
    size: int = 0  # of the part of the file that is used; 0: all
    once: bool = False  # no position twice
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Report:
    """What fio measured: operations and bytes per second, latencies in milliseconds."""

    iops: float
    bytes_per_second: float
    mean_ms: float
    p99_ms: float


def run(file: Path, job: Job) -> Report:
    """Runs one job.

    Raises:
        RuntimeError: fio reported an error, or an I/O of the job failed.
        subprocess.TimeoutExpired: it did not end; it was killed.
    """
    done = subprocess.run(
        _argv(file, job),
        capture_output=True,
        text=True,
        check=False,
        timeout=job.seconds + _GRACE_SECONDS,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode != 0:
        raise RuntimeError(f"fio {job.pattern} on {file}: {done.stderr.strip() or done.stdout[-500:]}")
    text = done.stdout
    report = json.loads(text[text.index("{") :])["jobs"][0]
    side = report["read" if "read" in job.pattern else "write"]
    latency = side["clat_ns"]
    return Report(
        side["iops"], side["bw_bytes"], latency["mean"] / 1e6, latency.get("percentile", {}).get("99.000000", 0) / 1e6
    )


def _argv(file: Path, job: Job) -> list[str]:
    options = {
        "name": "job",
        "filename": str(file),
        "rw": job.pattern,
        "bs": job.block_size,
        "iodepth": job.depth,
        "ioengine": "libaio" if job.direct else "psync",
        "direct": int(job.direct),
        "runtime": job.seconds,
        "offset": job.offset,
        "randseed": job.seed + 1,
        "output-format": "json",
    }
    if job.size:
        options["size"] = job.size
    if job.align:
        options["blockalign"] = job.align
    argv = [require("fio"), *(f"--{name}={value}" for name, value in options.items())]
    return argv if job.once else [*argv, "--time_based", "--norandommap"]
