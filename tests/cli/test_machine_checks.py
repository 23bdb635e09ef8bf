"""What a kernel, limits and folders can lack, and what `qedfs doctor` says of it."""

from __future__ import annotations

import os
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from qedfs.cli.doctor import machine_checks
from qedfs.cli.doctor.finding import Verdict, look
from qedfs.host import runtime


def test_a_kernel_that_lacks_something_says_what_that_means() -> None:
    pidfd = next(feature for feature in machine_checks.FEATURES if feature.name == "pidfd_open")
    found = machine_checks.kernel("4.18.0-553.el8", [pidfd])
    assert found.verdict is Verdict.WARN
    assert found.found == f"Linux 4.18.0-553.el8: without pidfd_open {pidfd.without}"
    assert found.way_out == "another kernel would have it (pidfd_open: Linux 5.3)"
    assert machine_checks.kernel("6.18.1", []).verdict is Verdict.OK


@pytest.mark.parametrize(
    ("release", "since"), [("6.5.0", True), ("6.18.44-fc-v595", True), ("6.4.16", False), ("5.15", False), ("7", True)]
)
def test_a_release_is_compared_by_its_numbers(release: str, since: bool) -> None:
    assert machine_checks.is_since(release, 6, 5) is since


def test_a_kernel_without_pressure_figures_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_checks, "PRESSURE", tmp_path)
    psi = next(feature for feature in machine_checks.FEATURES if feature.name == "PSI")
    assert not psi.there()
    for kind in ("io", "cpu"):
        (tmp_path / kind).write_text("some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n")
    assert psi.there()


@pytest.mark.parametrize(("limit", "verdict"), [(99 << 20, Verdict.WARN), (100 << 20, Verdict.OK)])
def test_too_little_memory(limit: int, verdict: Verdict) -> None:
    assert machine_checks.memory(limit).verdict is verdict


@pytest.mark.parametrize(
    ("most", "verdict"), [(256, Verdict.WARN), (4096, Verdict.OK), (resource.RLIM_INFINITY, Verdict.OK)]
)
def test_too_few_open_files(most: int, verdict: Verdict) -> None:
    assert machine_checks.open_files(most).verdict is verdict


def only(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """No other place for runtime folders than this."""
    for name in ("RUN", "USERS", "SHARED_MEMORY", "TEMPORARY"):
        monkeypatch.setattr(runtime, name, folder)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose path leaves room for that of a socket; pytest's own is long in a worker of xdist."""
    with tempfile.TemporaryDirectory(prefix="q") as name:
        yield Path(name)


def test_the_runtime_folder_is_made_looked_at_and_left_empty(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, short)
    found = look("runtime folder", machine_checks.runtime_folder)
    assert found.verdict is Verdict.OK
    (ours,) = short.iterdir()
    assert found.found.startswith(f"{ours} (")
    assert f"mode 0700, user {os.getuid()}, path of a socket {len(str(ours)) + 30} of 107 bytes" in found.found
    assert list(ours.iterdir()) == []


def test_no_place_for_a_socket_says_why_and_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, tmp_path / "nowhere")
    found = look("runtime folder", machine_checks.runtime_folder)
    assert found.verdict is Verdict.FAIL
    assert "No such file or directory" in found.found
    assert "set XDG_RUNTIME_DIR" in found.found


def test_a_path_that_is_too_long_for_a_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    only(monkeypatch, long)
    assert "too long for the path of a socket" in look("runtime folder", machine_checks.runtime_folder).found


def test_no_tmpfs_for_journals() -> None:
    assert machine_checks.journal(None).verdict is Verdict.WARN
    assert machine_checks.journal(Path("/dev/shm/qedfs-7")).verdict is Verdict.OK


def test_this_machine_is_looked_at() -> None:
    assert {examine().check for _, examine in machine_checks.checks()} == {name for name, _ in machine_checks.checks()}
