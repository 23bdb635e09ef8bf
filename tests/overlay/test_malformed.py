"""Malformed overlays: an error of ours or an answer, nothing else. `contrib/fuzz` runs the same for longer."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.overlay.malformed import generate, judge, named

RANDOM_CASES = 400


@pytest.fixture
def path() -> Iterator[Path]:
    # A tmpfs takes files of any length.
    path = Path("/dev/shm", f"qedfs-malformed-{random.randrange(1 << 60):x}.qed")
    yield path
    path.unlink(missing_ok=True)


async def test_named_cases(path: Path) -> None:
    verdicts = {case.name: await judge(case, path) for case in named()}
    assert len(verdicts) > 200
    refused = [name for name, verdict in verdicts.items() if verdict.error]
    assert 50 < len(refused) < len(verdicts) - 50


async def test_random_cases(path: Path) -> None:
    rng = random.Random(20101)
    verdicts = [await judge(generate(rng), path) for _ in range(RANDOM_CASES)]
    assert RANDOM_CASES / 10 < sum(bool(verdict.error) for verdict in verdicts) < RANDOM_CASES * 0.9
