"""A hung mount must fail its test, not stop the run: when a test takes too long its mounts are killed."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from tests.harness import mounts
from tests.harness.hang import HANG_SECONDS

# A read of a mount whose process is gone returns with ENOTCONN, so the blocked test goes on, and fails.
# Longer than any single wait of a test: that one's error says what was missing.
PATIENCE_SECONDS = 2 * HANG_SECONDS
SLOW_PATIENCE_SECONDS = 1200.0


@pytest.fixture(autouse=True)
def no_endless_wait(request: pytest.FixtureRequest) -> Iterator[None]:
    """Kills the mounts of a test that takes too long."""
    slow = request.node.get_closest_marker("slow") is not None
    timer = threading.Timer(SLOW_PATIENCE_SECONDS if slow else PATIENCE_SECONDS, mounts.kill_all)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
