"""How lines of the log look: with a time of their own, unless they go to systemd's journal."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tempfile

import pytest

from qedfs.cli.logs import is_journal
from tests.harness.hang import HANG_SECONDS

TIMED = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ")
PROGRAM = """
import logging
from qedfs.cli import logs
logs.set_up(verbose=True, as_json=AS_JSON)
log = logging.getLogger("qedfs.test")
log.debug("looked")
log.info("serves")
log.warning("disk.qed: slow\\n  try again")
try:
    raise ValueError("reason")
except ValueError:
    log.exception("failed")
"""


def logged(*, journal: bool, as_json: bool = False) -> list[str]:
    """The lines that a program logs to a pipe that is, or is not, what JOURNAL_STREAM names."""
    with tempfile.TemporaryFile() as log:
        status = os.fstat(log.fileno())
        stream = f"{status.st_dev}:{status.st_ino if journal else status.st_ino + 1}"
        subprocess.run(
            [sys.executable, "-c", PROGRAM.replace("AS_JSON", str(as_json))],
            env={**os.environ, "JOURNAL_STREAM": stream},
            stderr=log,
            timeout=HANG_SECONDS,
            check=True,
        )
        log.seek(0)
        return log.read().decode().splitlines()


def test_the_journal_gets_priorities_and_no_second_time() -> None:
    lines = logged(journal=True)
    assert lines[:4] == [
        "<7>DEBUG looked",
        "<6>INFO serves",
        "<4>WARNING disk.qed: slow",
        "<4>  try again",
    ]
    assert lines[4] == "<3>ERROR failed"
    # Each line of a traceback is an entry, as urgent as what it explains.
    assert lines[-1] == "<3>ValueError: reason"
    assert all(line.startswith("<3>") for line in lines[4:])


def test_elsewhere_each_record_has_its_time() -> None:
    lines = logged(journal=False)
    assert [TIMED.sub("", line) for line in lines[:3]] == ["DEBUG looked", "INFO serves", "WARNING disk.qed: slow"]
    assert all(TIMED.match(line) for line in lines[:3])


def test_json_is_json_in_the_journal_too() -> None:
    assert all(line.startswith('{"time": ') for line in logged(journal=True, as_json=True))


@pytest.mark.parametrize("stream", [io.StringIO(), sys.__stderr__])
def test_no_journal_without_systemd(stream: io.StringIO) -> None:
    assert not is_journal(stream, {})
