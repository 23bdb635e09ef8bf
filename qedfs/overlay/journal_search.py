"""Where the journal of a killed session is looked for, and whose journals are believed.

Owns the note in the record that tells of a journal, and the search. A session puts its journal where its user can; the
next one may be another user's. So the record notes that there is one, whose, of which file and of which boot. With it
a session finds the journal, or knows that it has not, and says so. Without it (a session that had none) all is well.

Trust: who writes a journal decides which places of the file its missing clusters lead to. That is nothing outside of
this overlay, and so those are believed who may write to the overlay anyway, or see what is read: its owner, root, and
the user who opens it. What others have left, or what may not be looked into, is not void for that: no session begins
over it, unless its user says so (`check --drop-journal`).

Must not know what a journal holds.
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
    """What the search came to: at most one of these."""

    orphan: OrphanJournal | None = None
    unread: str = ""  # why a journal that is there, or may be, was not read
    gone: str = ""  # that there was one, and where it is no more


def note(name: str) -> str:
    """What the record says of a journal of ours for the file of this name; "" where nothing can be said."""
    text = f"{user_number()}.{name}.{_boot()}"
    return text if _NOTE.fullmatch(text) else ""


def find(storage: Storage, folder: Path | None, session: str, noted: str) -> Found:
    """The journal of `session`, which has not ended in order. `folder`: one more place to look into, of the caller's.

    May wait for the disk only where the folder does.
    """
    name = storage.name()
    if not session or not name:
        return Found()
    user = user_number()
    if told := _NOTE.fullmatch(noted):
        if told[3] != _boot():
            return Found()  # lost with the power, as what was not flushed
        user = int(told[1])
        if told[2] != name:
            return Found(gone=f"it is a copy, made while a mount of it by {_called(user)} was not at its end")
        if user not in (0, user_number(), storage.owner()):
            return Found(unread=f"{_killed(user)}, and nobody vouches for the journal of one who does not own it")
    places = [RuntimeFolder(folder)] if folder is not None else []
    found = _search([*places, *journal_places(user)], storage, name, session, killed=_killed(user))
    # Of one that the record does not tell of nothing needs to be left.
    return found if told or found.orphan else Found()


def _search(places: list[RuntimeFolder], storage: Storage, name: str, session: str, *, killed: str) -> Found:
    unread = ""
    for place in places:
        try:
            left = read_journal(place, name, session, storage.device(), locked=storage.locked)
        except FileNotFoundError:
            continue
        except OSError as exc:
            unread = unread or f"{killed}, and what it has left may be in {place.path}: {exc.strerror}"
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
