"""Parsing and formatting of sizes and durations: 64K, 20M, 1G (powers of 1024); 10s, 5m, 2h. Imports errors only."""

from __future__ import annotations

import re

from qedfs.errors import UsageError

# Not compiled here: a command that only prints sizes needs neither.
_SIZE = r"^(\d+(?:\.\d+)?)\s*([KMGTPE]?)(?:i?B)?(?:/s)?$"
_DURATION = r"^(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)?$"
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5, "E": 6}
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_size(text: str) -> int:
    """Parse "64K", "20M", "1.5G" or "4096" into bytes. Raises UsageError."""
    found = re.match(_SIZE, text.strip(), re.IGNORECASE)
    if found is None:
        raise UsageError(f"{text!r} is not a size; write it like 64K, 20M or 1G")
    return int(float(found[1]) * 1024 ** _POWERS[found[2].upper()])


def parse_seconds(text: str) -> float:
    """Parse "30", "10s", "5m" or "2h" into seconds. Raises UsageError."""
    found = re.match(_DURATION, text.strip(), re.IGNORECASE)
    if found is None:
        raise UsageError(f"{text!r} is not a duration; write it like 30s, 10m or 2h")
    return float(found[1]) * _SECONDS[(found[2] or "s").lower()]


def format_size(size: float) -> str:
    """Three digits and a unit: "1.50 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if size < 1024 or unit == "PiB":
            digits = 0 if unit == "B" else 2 if size < 10 else 1 if size < 100 else 0
            return f"{size:.{digits}f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")


def format_seconds(seconds: float) -> str:
    """At most two units: "42s", "3m 20s", "2h 05m"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02}m"
