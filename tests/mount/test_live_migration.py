"""A guest that writes all the time is migrated live between two real QEMUs, and finds each block of its disk again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness.migration.scene import Plan, follow


def test_a_running_guest_moves_and_no_block_of_its_disk_is_stale(tmp_path: Path) -> None:
    report = follow(tmp_path, Plan(cache="writeback", reader=True))
    assert report.verdict.good, report
    assert report.verdict.written > 0


@pytest.mark.slow
@pytest.mark.parametrize("post_copy", [False, True], ids=["pre-copy", "post-copy"])
def test_a_running_guest_moves_whose_old_disk_has_tables(tmp_path: Path, post_copy: bool) -> None:
    """A server of it that has read its tables before the guest stood still would show old ones: it is started anew."""
    report = follow(tmp_path, Plan(source_format="qcow2", post_copy=post_copy, reader=True))
    assert report.verdict.good, report
    assert report.verdict.written > 0


@pytest.mark.slow
@pytest.mark.parametrize("blockdev", [False, True], ids=["drive", "blockdev"])
@pytest.mark.parametrize("cache", ["none", "writeback"])
@pytest.mark.parametrize("post_copy", [False, True], ids=["pre-copy", "post-copy"])
def test_a_running_guest_moves_in_every_way(tmp_path: Path, post_copy: bool, cache: str, blockdev: bool) -> None:
    report = follow(tmp_path, Plan(post_copy=post_copy, cache=cache, blockdev=blockdev, reader=True))
    assert report.verdict.good, report
