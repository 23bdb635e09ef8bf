"""A short soak, and the eyes that it looks with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.soak import RESTART_SECONDS, Sample, soak, trends
from tests.harness.require import require_fuse


@pytest.mark.slow
def test_a_minute(tmp_path: Path) -> None:
    require_fuse()
    with soak(tmp_path, 6, seed=1) as running:
        life = running.live(60, print)
    totals = running.totals
    assert totals.restarts >= 60 // RESTART_SECONDS - 1
    assert min(totals.reads, totals.writes) > 100
    assert not [str(trend) for trend in trends(life.samples, 20) if trend.grows and trend.name != "rss"]


@pytest.mark.parametrize(
    ("name", "step", "grows"),
    [
        ("fds", 0.1, True),
        ("fds", 0.0, False),
        ("threads", 0.1, True),
        ("tasks", 0.1, True),
        ("rss", 1e5, True),
        ("rss", 1e4, False),
    ],
)
def test_growth_is_noticed(name: str, step: float, *, grows: bool) -> None:
    """A descriptor in ten samples; 10 % and 1 % of memory in a hundred."""
    start = Sample(0.0, 30, 6, 40, 100_000_000)
    samples = [start._replace(seconds=float(n), **{name: int(getattr(start, name) + step * n)}) for n in range(120)]
    assert {trend.name for trend in trends(samples, 20) if trend.grows} == ({name} if grows else set())
