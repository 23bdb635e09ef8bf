"""How much of a long sweep a run takes: a sample by default, the whole with `--slow`.

Each promise keeps its test in the default run; only the number of cases that try to break it is smaller.
"""

from __future__ import annotations

# tests/conftest.py sets it before any test module is imported.
whole_sweeps = False


def sample(count: int, *, whole: int) -> int:
    """The number of cases to try: `count`, or `whole` with `--slow`."""
    return whole if whole_sweeps else count
