"""What `qedfs check` counts in the journal of a killed mount."""

from __future__ import annotations

from qedfs.cli.plain.check import _distinct
from qedfs.overlay.journal import zero_run

OFFSET = 1 << 20


def test_each_cluster_in_a_journal_counts_once() -> None:
    pairs = [(7, OFFSET), (2, zero_run(3)), (3, OFFSET), (7, OFFSET + 4096), (4, zero_run(2)), (0, OFFSET)]
    assert _distinct(pairs, 100) == len({0, 2, 3, 4, 5, 7})


def test_a_discard_costs_nothing_per_cluster_and_ends_with_the_image() -> None:
    """A forged one may claim any number of clusters."""
    assert _distinct([(1, zero_run(1 << 50)), (1 << 40, OFFSET)], 1 << 36) == (1 << 36) - 1
