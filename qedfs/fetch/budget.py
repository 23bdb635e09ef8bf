"""The memory budget of one queue: counts the bytes of its flights, in total and per consumer.

Owns the counts. A consumer whose disk hangs must not delay the others. So the bytes that wait for it count only against
itself, up to half of the budget. Must not know when requests are sent, nor the source. All sizes in bytes.
"""

from __future__ import annotations

from collections import Counter

from qedfs.fetch.flight import Consumer, Flight
from qedfs.host import memory_pool
from qedfs.host.memory_pool import Share

# For all flights of a queue, including those that have arrived and wait for a disk slower than the source. Other queues
# may leave it less (`memory_pool.py`).
MOST_HELD_BYTES = 128 << 20
# Of the half of it that a consumer may have, background requests leave one part in READERS_PART to what its readers ask
# for. Otherwise the bytes of a reader that comes while the disk is behind could not be adopted, and would be fetched
# again.
READERS_PART = 8


class Budget:
    """The byte counts of one queue's flights."""

    def __init__(self) -> None:
        self._share = Share(memory_pool.FETCHED)
        self.background = 0  # in flight, excluding urgent flights
        self._held_for: Counter[Consumer] = Counter()
        self._here_for: Counter[Consumer] = Counter()  # the part of it that came in the background

    @property
    def held(self) -> int:
        """Bytes of all flights: in flight, or arrived and not yet adopted."""
        return self._share.held_bytes

    def start(self, flight: Flight) -> None:
        """Count a flight that is being sent."""
        self._share.take(flight.size)
        if not flight.urgent:
            self.background += flight.size

    def join(self, flight: Flight, consumer: Consumer) -> None:
        """Add a consumer that will take the flight's bytes."""
        flight.consumers.append(consumer)
        self._held_for[consumer] += flight.size
        if flight.arrived.is_set() and not flight.urgent:
            self._here_for[consumer] += flight.size

    def arrive(self, flight: Flight) -> None:
        """Record that a flight has arrived."""
        if not flight.urgent:
            self.background -= flight.size
            for consumer in flight.consumers:
                self._here_for[consumer] += flight.size

    def leave(self, flight: Flight, consumer: Consumer) -> None:
        """Remove a consumer that is done with a flight, which has arrived."""
        flight.consumers.remove(consumer)
        self._held_for[consumer] -= flight.size
        if not flight.urgent:
            self._here_for[consumer] -= flight.size
        for counts in (self._held_for, self._here_for):
            if not counts[consumer]:
                del counts[consumer]

    def land(self, flight: Flight) -> None:
        """Release the bytes of a flight that has no consumers left."""
        self._share.give(flight.size)

    def held_for(self, consumer: Consumer) -> int:
        """Bytes for this consumer: in flight, or arrived and not yet adopted."""
        return self._held_for[consumer]

    def in_flight(self, consumer: Consumer | None) -> int:
        """Background bytes in flight, plus what has arrived for this consumer and its slow disk has not yet stored."""
        return self.background + (0 if consumer is None else self._here_for[consumer])

    def has_room(self, size: int) -> bool:
        """Whether the budget allows `size` more bytes."""
        return self._share.fits(size) and (not self.held or self.held + size <= MOST_HELD_BYTES)

    def is_behind(self, consumer: Consumer, size: int, *, background: bool = False) -> bool:
        """Whether this consumer lags so far behind that it is not offered `size` more bytes.

        `background`: whether so far that they should not even be requested for it, as nobody waits for them.
        """
        held = self._held_for[consumer]
        most = min(MOST_HELD_BYTES, self._share.limit_bytes) // 2
        return held > 0 and held + size > most - (most // READERS_PART if background else 0)
