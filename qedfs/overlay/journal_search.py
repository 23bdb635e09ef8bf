"""Finds the journal of a killed session, and decides whose journals are trusted.

Owns the note about a journal in the record, and the search. A session creates its journal in a folder of its user, but
the next session may be another user's. So the record of a session with a journal has a note: the user, the overlay file
and the boot. If the record has a note, the next session finds the journal, or reports that it did not find it. Without
a note the killed session usually had no journal, but if one is found, it is used.

Trust: a journal says which bytes of the overlay file some missing clusters read as, so its writer could show any part
of that file, but nothing else. Therefore the trusted users are those who may write to the overlay, or see its contents,
anyway: its owner, root, and the user who opens it. A journal of another user, or one that cannot be accessed, is not
ignored: no session starts until it has been read, or the user gives it up (`check --drop-journal`).

Must not know the contents of a journal.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from qedfs.host.procfs import boot_id
from qedfs.host.runtime import RuntimeFolder, journal_places, user_number
from qedfs.overlay.journal import OrphanJournal, read_journal
from qedfs.overlay.storage import Storage

_NOTE = re.compile(r"([0-9]{1,10})\.([0-9a-z]{1,16})\.([0-9a-f]{8})")


class Found(NamedTuple):
    """The result of the search. At most one of the fields is set."""

    orphan: OrphanJournal | None = None
    unread: str = ""  # why a journal that exists, or may exist, was not read
    gone: str = ""  # a message that the journal is lost


def note(name: str) -> str:
    """The note to store in the record about our journal for the file of this name; "" if no note can be made."""
    text = f"{user_number()}.{name}.{_boot()}"
    return text if _NOTE.fullmatch(text) else ""


def find(storage: Storage, folder: Path | None, session: str, noted: str) -> Found:
    """Find the journal of `session`, which did not end cleanly. `folder`: an additional folder to search.

    `noted`: the note in the record, or "". Waits for the disk only if `folder` is on one.
    """
    name = storage.name()
    if not session or not name:
        return Found()
    user = user_number()
    if told := _NOTE.fullmatch(noted):
        user = int(told[1])
        try:
            boot = boot_id()
        except OSError as exc:  # no descriptor is left, perhaps. Whether there was a reboot is unknown.
            return Found(unread=f"{_killed(user)}, and the id of this boot cannot be read: {exc.strerror}")
        if told[3] != boot[:8]:
            return Found()  # lost in a power cut or reboot, like the writes that were not flushed
        if told[2] != name:
            return Found(gone=f"it is a copy, made while it was mounted by {_called(user)}")
        if user not in (0, user_number(), storage.owner()):
            return Found(unread=f"{_killed(user)}, and the journal of a user who does not own it is not trusted")
    places = [RuntimeFolder(folder)] if folder is not None else []
    found = _search([*places, *journal_places(user)], storage, name, session, killed=_killed(user))
    # Without a note in the record there need not be a journal, so its absence is not reported.
    return found if told or found.orphan else Found()


def _search(places: list[RuntimeFolder], storage: Storage, name: str, session: str, *, killed: str) -> Found:
    unread = ""
    for place in places:
        try:
            left = read_journal(place, name, session, storage.device(), locked=storage.locked)
        except FileNotFoundError:
            continue
        except OSError as exc:
            unread = unread or f"{killed}, and its journal may be in {place.path}: {exc.strerror}"
        else:
            return Found(left)
    if unread:
        return Found(unread=unread)
    looked = ", ".join(dict.fromkeys(str(place.path) for place in places))
    return Found(gone=f"{killed}, and its journal is no longer in {looked}")


def _killed(user: int) -> str:
    return f"a mount of it by {_called(user)} was killed"


def _called(user: int) -> str:
    return f"user {user}" if user else "root"


def _boot() -> str:
    try:
        return boot_id()[:8]
    except OSError:
        return ""
