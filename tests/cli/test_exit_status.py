"""Every failure is one line and an exit code; a traceback never reaches the user."""

from __future__ import annotations

import click
import pytest

from qedfs.cli.entry import INTERRUPTED
from qedfs.cli.exit_status import explain, guarded
from qedfs.errors import (
    BadOverlay,
    InUse,
    NoSpace,
    QedfsError,
    ReadOnlyOverlay,
    Refused,
    SourceChanged,
    SourceError,
    SourceUnreachable,
    TimedOut,
    UsageError,
)

CODES = {
    QedfsError: 1,
    ReadOnlyOverlay: 1,
    UsageError: 2,
    BadOverlay: 3,
    SourceError: 4,
    SourceUnreachable: 4,
    SourceChanged: 5,
    NoSpace: 6,
    TimedOut: 7,
    InUse: 8,
    Refused: 9,
}


def raising(error: BaseException) -> int:
    def run() -> None:
        raise error

    return guarded(run)


@pytest.mark.parametrize("kind", CODES)
def test_each_error_has_its_exit_code(kind: type[QedfsError], capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(kind("what went wrong")) == CODES[kind]
    assert capsys.readouterr() == ("", "qedfs: what went wrong\n")


def test_the_cause_is_found_in_what_nurseries_raise(capsys: pytest.CaptureFixture[str]) -> None:
    inner = BaseExceptionGroup("inner", [ValueError("noise"), NoSpace("disk full")])
    assert raising(BaseExceptionGroup("outer", [KeyboardInterrupt(), inner])) == 6
    assert capsys.readouterr().err == "qedfs: disk full\n"


def test_interrupts_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(KeyboardInterrupt()) == INTERRUPTED
    assert raising(click.Abort()) == INTERRUPTED
    assert raising(BaseExceptionGroup("nursery", [KeyboardInterrupt()])) == INTERRUPTED
    assert capsys.readouterr() == ("", "")


def test_usage_errors_of_click(capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(click.UsageError("no such option")) == 2
    assert "no such option" in capsys.readouterr().err


def test_errors_of_the_system_name_the_file() -> None:
    assert explain(FileNotFoundError(2, "No such file", "/x")) == ("/x: No such file", 1)


def test_faults_of_ours_are_one_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(RuntimeError("broken\nhere")) == 1
    assert capsys.readouterr().err == "qedfs: internal error: RuntimeError: broken here\n"


def test_results() -> None:
    assert guarded(lambda: None) == 0
    assert guarded(lambda: 5) == 5
