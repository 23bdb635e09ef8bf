"""The kernel's limit on unanswered requests: which of its two numbers counts, and how far below it we stay."""

from __future__ import annotations

from pathlib import Path

import pytest

from qedfs.mount.request_timeout import (
    MARGIN_SECONDS,
    kernel_limit,
    most_wait_seconds,
    remark_on_limit,
    remark_on_watchdog,
)


def sysctls(folder: Path, default: str, most: str) -> Path:
    (folder / "default_request_timeout").write_text(default + "\n")
    (folder / "max_request_timeout").write_text(most + "\n")
    return folder


@pytest.mark.parametrize(
    ("default", "most", "limit"),
    [
        ("0", "0", None),
        ("60", "0", 60),
        ("0", "60", 60),
        ("60", "120", 60),
        ("120", "60", 60),
        ("0", "1", 15),
        ("x", "0", None),
    ],
)
def test_which_limit_counts(tmp_path: Path, default: str, most: str, limit: int | None) -> None:
    folder = sysctls(tmp_path, default, most)
    assert kernel_limit(folder) == limit
    assert most_wait_seconds(folder) == (float("inf") if limit is None else limit - MARGIN_SECONDS)


def test_an_older_kernel_has_no_limit(tmp_path: Path) -> None:
    assert kernel_limit(tmp_path) is None
    assert remark_on_limit(float("inf"), tmp_path) == ""


def test_a_wait_that_the_kernel_would_end_is_remarked_on(tmp_path: Path) -> None:
    folder = sysctls(tmp_path, "0", "60")
    assert remark_on_limit(30, folder) == ""
    text = remark_on_limit(float("inf"), folder)
    assert "within 60 s (fs.fuse.max_request_timeout" in text
    assert text.endswith("for 55 s at most")


def test_a_watchdog_that_would_come_after_the_kernel_is_remarked_on(tmp_path: Path) -> None:
    assert remark_on_watchdog(90, sysctls(tmp_path, "0", "0")) == ""
    folder = sysctls(tmp_path, "0", "60")
    assert remark_on_watchdog(45, folder) == ""
    text = remark_on_watchdog(90, folder)
    assert "within 60 s (fs.fuse.max_request_timeout" in text
    assert "is replaced after 90 s: set WatchdogSec= of the unit lower" in text
