"""What holds for every test: its tiers, a quiet log, and long runs only on request.

Log guard: a test during which anything logs at WARNING or above fails, unless it announced the line with the marker
`@pytest.mark.expect_log("pattern")` or the fixture `expect_log("pattern")` (regular expressions, searched in the
message), or takes `caplog` and so looks at the log itself.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import re
import signal
from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, settings
from trio.testing import MockClock

from qedfs.host import memory_pool
from tests.harness import require, sample, worker
from tests.harness.tiers import TIERS, UNIT, tiers_of


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow, and sweeps as a whole")


def pytest_configure(config: pytest.Config) -> None:
    # A shell's background job inherits that SIGINT is ignored, and so would each program that a test interrupts.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # A run that is told to end (`timeout`, CI) leaves by the road of Ctrl-C: servers and mounts are taken down.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    if "PYTEST_XDIST_WORKER" in os.environ:
        worker.separate()
    # Test modules are imported after this.
    sample.whole_sweeps = config.getoption("--slow")
    # Deadlines and the check for slow generation would measure how busy the machine is.
    settings.register_profile(
        "sample",
        max_examples=sample.sample(25, whole=100),
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    settings.load_profile("sample")
    config.addinivalue_line("markers", "expect_log(*patterns): log lines at WARNING or above that the test provokes")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Seven thousand tests are half a million objects that stay: the garbage collector need not look at them.

    It takes 1.8 of the 6 seconds of processor time of a collection, and each worker collects.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marker
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function):
            tiers = tiers_of(item)
            for tier in sorted(tiers):
                item.add_marker(tier)
            # A tracer would slow down the servers of the other tests, and so change what they see. It could not see
            # mount processes anyway.
            if tiers != {UNIT} and config.pluginmanager.hasplugin("_cov"):
                item.add_marker("no_cover")
    # Deselected, not skipped: a skip says that a test could not run here.
    if config.getoption("--slow"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if not item.get_closest_marker("slow")]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """`require` refuses what the test's tier has not."""
    with require.only({tier for tier in TIERS if item.get_closest_marker(tier)}):
        return (yield)


@pytest.fixture(autouse=True)
def room_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test leaves held is no matter of the next one's."""
    for name in ("FETCHED", "TABLES", "PARTIAL_WRITES", "ALONE"):
        monkeypatch.setattr(memory_pool, name, memory_pool.Pool(getattr(memory_pool, name).most_bytes))


class LogGuard(logging.Handler):
    """Keeps what was logged at WARNING or above, and the patterns that were announced."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.patterns: list[str] = []
        self._records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append(record)

    def unannounced(self) -> list[str]:
        """The lines that no pattern covers, as `LEVEL logger: message`."""
        return [
            f"{record.levelname} {record.name}: {record.getMessage()}"
            for record in self._records
            if not any(re.search(pattern, record.getMessage()) for pattern in self.patterns)
        ]


@pytest.fixture(autouse=True)
def log_guard(request: pytest.FixtureRequest) -> Iterator[LogGuard]:
    """Fails the test if it logged what it did not announce; active through the teardown of every other fixture."""
    guard = LogGuard()
    for marker in request.node.iter_markers("expect_log"):
        guard.patterns += marker.args
    logging.getLogger().addHandler(guard)
    try:
        yield guard
    finally:
        logging.getLogger().removeHandler(guard)
    unannounced = guard.unannounced()
    if unannounced and "caplog" not in request.fixturenames:
        pytest.fail("logged without announcement:\n" + "\n".join(unannounced), pytrace=False)


@pytest.fixture
def expect_log(log_guard: LogGuard) -> Callable[[str], None]:
    """Announces a log line at WARNING or above, by a regular expression."""
    return log_guard.patterns.append


@pytest.fixture
def autojump_clock(monkeypatch: pytest.MonkeyPatch) -> MockClock:
    """pytest-trio's clock, which jumps to the next deadline when all tasks wait; here it lets threads work first.

    A task that waits for a thread waits for nothing that trio could know of. Without this, the clock would jump to the
    deadline of the call before the thread has had a chance. While a thread works it does not jump at all, however long
    a busy machine takes.
    """
    clock = MockClock(autojump_threshold=0)
    run_sync = trio.to_thread.run_sync
    working = 0

    async def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal working
        working += 1
        clock.autojump_threshold = math.inf
        try:
            return await run_sync(*args, **kwargs)
        finally:
            working -= 1
            clock.autojump_threshold = math.inf if working else 0

    monkeypatch.setattr(trio.to_thread, "run_sync", counted)
    return clock
