"""Units of sizes, and the names of by-products that rows have in common. No I/O."""

from __future__ import annotations

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

WIRE = "wire/needed"
TWICE = "clusters twice"
COMPARED = "compared KiB"
PEAK = "peak MiB"
CPU = "CPU s/GiB"
