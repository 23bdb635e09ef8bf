"""What a process has used, from /proc: processor time and the most memory it held."""

from __future__ import annotations

import os
import time
from pathlib import Path

from .figures import CPU, GIB, PEAK

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and the children it has waited for, in seconds (proc_pid_stat(5))."""
    # The name, in parentheses, may hold blanks.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(ticks) for ticks in fields[11:15]) / _TICKS_PER_SECOND


def peak_mib(pid: int) -> float:
    """The largest resident set of a process since it began (VmHWM), in MiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return 0.0


class Meter:
    """Wall and processor time of one process from now on."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._cpu = cpu_seconds(pid)
        self._began = time.monotonic()

    def read(self, size: int) -> tuple[float, dict[str, float]]:
        """Seconds since the beginning, and the figures for `size` bytes of work."""
        seconds = time.monotonic() - self._began
        cpu = cpu_seconds(self._pid) - self._cpu
        return seconds, {CPU: cpu * GIB / size, PEAK: peak_mib(self._pid)}
