"""How often something took how long, in buckets whose bounds never change. A leaf; pure arithmetic."""

from __future__ import annotations

from bisect import bisect_left

# Seconds; each bucket holds what took at most this long and longer than the bound before. From a server in the next
# rack to the longest deadline of a read.
BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Histogram:
    """Counts of durations. Noting one costs half a microsecond."""

    __slots__ = ("counts", "seconds")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)  # the last bucket: longer than any bound
        self.seconds = 0.0  # the sum of all

    def note(self, seconds: float) -> None:
        """Count one that took `seconds`."""
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.seconds += seconds

    def up_to(self) -> list[int]:
        """For each bound, and then for infinity, how many took at most that long."""
        total = 0
        return [total := total + count for count in self.counts]
