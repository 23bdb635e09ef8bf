"""What `qedfs check` does, without click.

Owns the order of a check: lock, walk, repair, barrier, report; and the keys of `check --json`. Must not know what a
walk finds wrong (`overlay/check.py`).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable

from qedfs.cli.locked_file import locked_file
from qedfs.cli.ui.copy_progress import drawn_by_work
from qedfs.cli.ui.output import print_fields, print_json
from qedfs.errors import BadOverlay
from qedfs.format.header import NEED_CHECK, Header
from qedfs.overlay.check import Report, give_back_leaks
from qedfs.overlay.check import check as check_tables
from qedfs.overlay.check import repair as repair_tables
from qedfs.overlay.journal import Pair, run_count
from qedfs.overlay.journal_search import find
from qedfs.overlay.revalidation import revalidate
from qedfs.overlay.session import Session, read_header, read_record
from qedfs.overlay.storage import Storage

MOST_PROCESSES = 4  # that share the walk over a large overlay: they wait for one memory


def check(overlay: str, *, repair: bool = False, drop_journal: bool = False, as_json: bool = False) -> None:
    """See the command's help."""
    with locked_file(overlay, writable=repair or drop_journal) as storage:
        if drop_journal:
            _drop_journal(storage)
        revalidate(storage, None)
        header, _ = read_header(storage)
        with drawn_by_work(os.path.basename(overlay), header.geometry.image_size) as told:
            walk = repair_tables if repair else check_tables
            report = walk(storage, header, told, processes=min(MOST_PROCESSES, len(os.sched_getaffinity(0))))
        if repair:
            _make_durable(storage, header, report)
        waiting, remark = _waiting(storage)
        if repair and report.leaks and not (report.corruptions or waiting or remark):
            report.leaks = give_back_leaks(storage, read_header(storage)[0])
    if as_json:
        print_json({"overlay": os.path.abspath(overlay), **_for_programs(report), **_journal(waiting, remark)})
    else:
        print_fields(_for_people(report, waiting, remark))
    if report.corruptions:
        hint = "" if repair else "; qedfs check --repair repairs what can be repaired"
        raise BadOverlay(f"{overlay}: {report.corruptions} damaged entries: {report.first_problem}{hint}")


def _make_durable(storage: Storage, header: Header, report: Report) -> None:
    if header.dirty and not report.corruptions:
        # clear_dirty has the barrier that makes the repair durable first.
        Session(storage, header, read_record(storage, header)).clear_dirty(NEED_CHECK)
    else:
        storage.barrier()


def _drop_journal(storage: Storage) -> None:
    """Remove the killed session from the record, after making sure that the disk has everything that we read."""
    storage.refresh()
    header, _ = read_header(storage)
    if (record := read_record(storage, header)) is not None:
        Session(storage, header, record).store(dataclasses.replace(record, session="", journal=""))


def _waiting(storage: Storage) -> tuple[int, str]:
    """(clusters in the journal of a killed mount, why that journal cannot be read). The next mount brings them in."""
    header, _ = read_header(storage)
    session = Session(storage, header, read_record(storage, header))
    found = find(storage, None, session.record.session, session.record.journal)
    if not session.untouched:
        return 0, ""
    pairs = found.orphan.pairs if found.orphan else ()
    return _distinct(pairs, header.geometry.clusters), found.unread or found.gone


def _distinct(pairs: Iterable[Pair], total: int) -> int:
    """How many of `total` clusters these entries of a journal concern. One entry may discard billions of them."""
    count = reached = 0
    for first, stop in sorted((cluster, min(cluster + (run_count(entry) or 1), total)) for cluster, entry in pairs):
        count += max(0, stop - max(first, reached))
        reached = max(reached, stop)
    return count


def _for_programs(report: Report) -> dict[str, object]:
    return {
        "total_clusters": report.total,
        "data_clusters": report.allocated,
        "zero_clusters": report.zero,
        "missing_clusters": report.total - report.allocated - report.zero,
        "leaked_clusters": report.leaks,
        "tables": report.tables,
        "corruptions": report.corruptions,
        "repaired": report.repaired,
        "first_problem": report.first_problem or None,
    }


def _journal(waiting: int, remark: str) -> dict[str, object]:
    return {"journal_clusters": waiting, "journal_error": remark or None}


def _for_people(report: Report, waiting: int, remark: str) -> dict[str, object]:
    return {
        "clusters": report.total,
        "data": report.allocated,
        "zeros": report.zero,
        "missing": report.total - report.allocated - report.zero,
        "tables": report.tables,
        "repaired": report.repaired or None,
        "damaged": report.corruptions or None,
        "leaked": f"{report.leaks} clusters; harmless" if report.leaks else None,
        "in a journal": f"{waiting} clusters of a killed mount; the next mount restores them" if waiting else None,
        "journal": remark or None,
        "result": "damaged" if report.corruptions else "sound",
    }
