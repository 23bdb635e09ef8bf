"""The marks of lost entries on their way into the file: written at once, or owed until there is room."""

from __future__ import annotations

import pytest

from qedfs.errors import NoSpace, QedfsError, ReadOnlyOverlay
from qedfs.overlay.barrier import Barriers
from qedfs.overlay.session_journal import SessionJournal
from qedfs.overlay.truncation_marks import TruncationMarks
from tests.fakes.storage import MemoryStorage

FIRST, SECOND = (0, b"a" * 512), (1024, b"b" * 512)


@pytest.fixture
def storage() -> MemoryStorage:
    return MemoryStorage(bytes(4096))


@pytest.fixture
def barriers(storage: MemoryStorage) -> Barriers:
    return Barriers(storage, SessionJournal())


@pytest.fixture
def marks(storage: MemoryStorage, barriers: Barriers) -> TruncationMarks:
    return TruncationMarks(storage, barriers)


def written(storage: MemoryStorage) -> str:
    return bytes(storage.bytes).replace(b"\0", b"").decode()


def test_marks_are_written_at_once_and_need_a_barrier(storage: MemoryStorage, marks: TruncationMarks) -> None:
    unsecured = [marks.unsecured]
    assert marks.write([FIRST, SECOND])
    assert written(storage) == "a" * 512 + "b" * 512
    unsecured.append(marks.unsecured)
    marks.secured(marks.found)
    unsecured.append(marks.unsecured)
    assert unsecured == [False, True, False]


def test_a_barrier_covers_no_mark_that_was_found_while_it_ran(marks: TruncationMarks) -> None:
    marks.write([FIRST])
    found = marks.found
    marks.write([SECOND])
    marks.secured(found)
    unsecured = [marks.unsecured]
    marks.secured(marks.found)
    marks.secured(found)  # a barrier that began earlier and ends later takes nothing back
    unsecured.append(marks.unsecured)
    assert unsecured == [True, False]


def test_what_finds_no_room_is_owed(storage: MemoryStorage, marks: TruncationMarks) -> None:
    storage.fail("write", NoSpace("disk full"), nth=2, forever=True)
    assert not marks.write([FIRST, SECOND])
    assert written(storage) == "a" * 512
    with pytest.raises(NoSpace):
        marks.write_owed()
    storage.mend()
    marks.write_owed()
    assert written(storage) == "a" * 512 + "b" * 512
    writes = storage.operations["write"]
    marks.write_owed()
    assert storage.operations["write"] == writes


def test_after_a_failed_barrier_the_file_gets_nothing(
    storage: MemoryStorage, barriers: Barriers, marks: TruncationMarks
) -> None:
    storage.fail("barrier", QedfsError("the disk fails"))
    with pytest.raises(ReadOnlyOverlay):
        barriers.barrier()
    assert not marks.write([FIRST])
    assert written(storage) == ""
    assert marks.unsecured  # so nothing is allocated


def test_after_the_close_the_file_gets_nothing(storage: MemoryStorage, marks: TruncationMarks) -> None:
    marks.close()
    assert not marks.write([FIRST])
    assert written(storage) == ""
