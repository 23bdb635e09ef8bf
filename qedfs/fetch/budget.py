"""How many bytes a queue has under way, and how many wait for each of those who keep them.

Owns the counts. One whose disk hangs must hold up nobody else, so what waits for it counts against itself only, up to
half of what may be held. Must not know when requests leave, nor the source. All sizes in bytes.
"""

from __future__ import annotations

from collections import Counter

from qedfs.fetch.flight import Consumer, Flight
from qedfs.host import memory_pool
from qedfs.host.memory_pool import Share

# Of all flights of a queue, those included whose bytes wait for a disk that is slower than the source. Other queues may
# leave it less (`memory_pool.py`).
MOST_HELD_BYTES = 128 << 20


class Budget:
    """The flights of one queue, counted."""

    def __init__(self) -> None:
        self._share = Share(memory_pool.FETCHED)
        self.background = 0  # on the way, and nobody waited for them when they left
        self._held_for: Counter[Consumer] = Counter()
        self._here_for: Counter[Consumer] = Counter()  # of those, what has arrived and was fetched in the background

    @property
    def held(self) -> int:
        """By all flights: on the way, or here and not adopted yet."""
        return self._share.held_bytes

    def start(self, flight: Flight) -> None:
        """A flight leaves."""
        self._share.take(flight.size)
        if not flight.urgent:
            self.background += flight.size

    def join(self, flight: Flight, consumer: Consumer) -> None:
        """Somebody will take the flight's bytes."""
        flight.consumers.append(consumer)
        self._held_for[consumer] += flight.size
        if flight.arrived.is_set() and not flight.urgent:
            self._here_for[consumer] += flight.size

    def arrive(self, flight: Flight) -> None:
        """A flight has arrived."""
        if not flight.urgent:
            self.background -= flight.size
            for consumer in flight.consumers:
                self._here_for[consumer] += flight.size

    def leave(self, flight: Flight, consumer: Consumer) -> None:
        """Somebody is done with a flight that has arrived."""
        flight.consumers.remove(consumer)
        self._held_for[consumer] -= flight.size
        if not flight.urgent:
            self._here_for[consumer] -= flight.size
        for counts in (self._held_for, self._here_for):
            if not counts[consumer]:
                del counts[consumer]

    def land(self, flight: Flight) -> None:
        """A flight has no takers any more."""
        self._share.give(flight.size)

    def held_for(self, consumer: Consumer) -> int:
        """On the way to it, or here and not kept yet."""
        return self._held_for[consumer]

    def in_flight(self, consumer: Consumer | None) -> int:
        """Of the background, on the way, or here for this taker: what its disk is slow to keep counts as well."""
        return self.background + (0 if consumer is None else self._here_for[consumer])

    def has_room(self, size: int) -> bool:
        """Whether so much more may be held."""
        return self._share.fits(size) and (not self.held or self.held + size <= MOST_HELD_BYTES)

    def is_behind(self, consumer: Consumer, size: int) -> bool:
        """Whether so much waits for this taker that it is offered no `size` more."""
        held = self._held_for[consumer]
        return held > 0 and held + size > min(MOST_HELD_BYTES, self._share.limit_bytes) // 2
