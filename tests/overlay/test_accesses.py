"""Numbers of accesses: the oldest that is running, whatever the order in which they end."""

from __future__ import annotations

from qedfs.overlay.accesses import Accesses


def test_the_oldest_that_is_running() -> None:
    accesses = Accesses()
    assert (accesses.oldest, accesses.next) == (0, 0)
    first, second = accesses.running(), accesses.running()
    first.__enter__()
    second.__enter__()
    assert (accesses.oldest, accesses.next) == (0, 2)
    first.__exit__(None, None, None)
    assert accesses.oldest == 1
    second.__exit__(None, None, None)
    assert (accesses.oldest, accesses.next) == (2, 2)
