"""The copy of an overlay that is in a session is an overlay of its own, on the disk when the call returns."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from qedfs.format.record import Record
from qedfs.overlay.open import open_storage
from qedfs.overlay.session import read_header, read_record
from qedfs.overlay.session_copy import end_session
from tests.fakes.storage import MemoryStorage
from tests.overlay.guest import no_fill
from tests.overlay.images import empty

CLUSTER = 4096


@pytest.mark.parametrize("paused", [False, True])
async def test_session_and_journal_go_and_the_rest_stays(tmp_path: Path, paused: bool) -> None:
    storage = MemoryStorage(empty().data, name="disk")
    overlay = await open_storage(storage, journal_folder=tmp_path)
    await overlay.change_record(lambda record: dataclasses.replace(record, paused=paused))
    await overlay.write(0, b"a" * CLUSTER, no_fill)
    await overlay.commit()
    of_original = read_record(storage, read_header(storage)[0]) or Record()
    assert of_original.session
    copy = MemoryStorage(storage.bytes, name="copy")
    end_session(copy, modified_ns=5, changed_ns=6)
    assert not copy.unsynced
    header, backing = read_header(copy)
    record = read_record(copy, header) or Record()
    assert (record.session, record.journal, record.times, record.written) == ("", "", (5, 6), False)
    assert (record.paused, record.pin, backing) == (paused, of_original.pin, overlay.backing)
    # What becomes of the original is in its journal, which nobody replays into the copy.
    await overlay.write(CLUSTER, b"b" * CLUSTER, no_fill)
    again = await open_storage(copy, journal_folder=tmp_path)
    assert again.journal_remark == ""
    assert [run.offset > 1 for run in await again.map(0, 2 * CLUSTER)] == [True, False]
    await again.close()
    await overlay.close()


def test_an_overlay_without_room_for_a_record_becomes_durable_as_well() -> None:
    built = empty(backing=b"http://fake/" + b"d" * 1000)  # reaches into the first slot, in one header cluster
    header = dataclasses.replace(built.header, header_size=1, l1_table_offset=4096)
    data = bytearray(4096 + header.geometry.table_bytes)
    data[:64] = header.encode()
    data[64 : 64 + header.backing_name_size] = built.data[64 : 64 + header.backing_name_size]
    copy = MemoryStorage(data)
    copy.write(len(data), [bytes(4096)])
    end_session(copy, modified_ns=1, changed_ns=2)
    assert not copy.unsynced
    assert copy.bytes[: len(data)] == data
