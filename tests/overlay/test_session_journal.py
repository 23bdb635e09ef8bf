"""The journal of a session that may have none, or lose it: nothing fails, and `takes_entries` tells."""

from __future__ import annotations

from pathlib import Path

import pytest

from qedfs.overlay.journal import Journal
from qedfs.overlay.session_journal import SessionJournal

PAIRS = [(1, 0x3000), (2, 0x4000)]


def begun(folder: Path) -> SessionJournal:
    journal = SessionJournal()
    journal.begin(Journal.create(folder, "disk", "session", device=1))
    return journal


def test_without_a_journal_nothing_is_kept_and_nothing_fails() -> None:
    journal = SessionJournal()
    for _ in range(2):
        assert not journal.takes_entries
        journal.append(PAIRS)
        journal.landed(journal.end)
        journal.void()
        journal.begin(None)  # the session has begun, and has none
    journal.close(remove=True)


def test_entries_are_kept_until_they_have_landed(tmp_path: Path) -> None:
    journal = begun(tmp_path)
    empty = journal.end
    journal.append(PAIRS)
    assert journal.takes_entries
    assert journal.end == empty + 32
    journal.landed(journal.end)
    assert journal.end == empty
    journal.close(remove=False)
    assert len(list(tmp_path.iterdir())) == 1
    assert not journal.takes_entries


def test_a_group_from_before_the_session_takes_nothing_out(tmp_path: Path) -> None:
    journal = SessionJournal()
    end = journal.end
    journal.begin(Journal.create(tmp_path, "disk", "session", device=1))
    journal.append(PAIRS)
    kept = journal.end
    journal.landed(end)
    assert journal.end == kept
    journal.close(remove=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.expect_log("No such file or directory; writes to new clusters wait for a commit")
def test_one_that_is_lost_takes_nothing_more(tmp_path: Path) -> None:
    journal = begun(tmp_path)
    journal.append(PAIRS)
    for path in tmp_path.iterdir():
        path.unlink()
    for _ in range(2):
        journal.append(PAIRS)
        assert not journal.takes_entries
    journal.close(remove=True)


def test_one_that_was_made_void_is_gone_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = begun(tmp_path)
    journal.append(PAIRS)
    journal.void()
    assert not list(tmp_path.iterdir())
    journal.append(PAIRS)
    assert not journal.takes_entries
    assert not caplog.records
    journal.landed(journal.end)
    assert not list(tmp_path.iterdir())
    journal.close(remove=False)
