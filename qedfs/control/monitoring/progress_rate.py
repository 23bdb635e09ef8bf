"""How fast an image fills. Owns the samples of the last seconds, the rate and the remaining time; no I/O."""

from __future__ import annotations

from collections import deque

WINDOW_SECONDS = 5.0
SAMPLE_SECONDS = 0.5


class Rate:
    """Bytes per second over the last `WINDOW_SECONDS`. Times in seconds of any monotonic clock."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()

    def note(self, now: float, done: int) -> None:
        """Add a sample: `done` bytes at this moment. If `done` shrinks, counting has restarted: older samples go."""
        if self._samples and done < self._samples[-1][1]:
            self._samples.clear()
        self._samples.append((now, done))
        while len(self._samples) > 2 and self._samples[1][0] <= now - WINDOW_SECONDS:
            self._samples.popleft()

    @property
    def value(self) -> float:
        """Bytes per second; 0 before there are two samples."""
        if len(self._samples) < 2:
            return 0.0
        (start, first), (end, last) = self._samples[0], self._samples[-1]
        return (last - first) / (end - start) if end > start else 0.0

    def seconds_for(self, left: int) -> float | None:
        """Seconds that `left` bytes will take at this rate, or None if unknown."""
        rate = self.value
        if not left:
            return 0.0
        return left / rate if rate > 0 else None
