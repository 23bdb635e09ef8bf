"""The buckets of a histogram."""

from __future__ import annotations

import math

import pytest

from qedfs.fetch.latency import BOUNDS, Histogram


@pytest.mark.parametrize(
    ("seconds", "bucket"),
    [(0.0, 0), (0.001, 0), (0.0011, 1), (0.05, 5), (30.0, 13), (30.1, 14), (math.inf, 14)],
)
def test_a_bound_belongs_to_the_bucket_that_it_ends(seconds: float, bucket: int) -> None:
    histogram = Histogram()
    histogram.note(seconds)
    assert [index for index, count in enumerate(histogram.counts) if count] == [bucket]


def test_counts_up_to_each_bound() -> None:
    histogram = Histogram()
    for seconds in (0.0005, 0.002, 0.002, 60.0):
        histogram.note(seconds)
    assert histogram.up_to() == [1, *[3] * 13, 4]
    assert len(histogram.up_to()) == len(BOUNDS) + 1
    assert histogram.seconds == pytest.approx(60.0045)
