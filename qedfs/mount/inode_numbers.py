"""The inode numbers of the images, and the handles of all that is open, for the lifetime of the mount.

Owns the numbers, and what the next server has to know of them (`held.py`): the kernel, and whoever has an image open,
know an image by its number only. Must not know what is done with an image.

A number is never used again for anything else, because the kernel keeps the pages of a file under it. So the next
server gives an image its number back only if nobody else has changed the overlay meanwhile: it has the same name, is
the same file, and its record shows either a session of this mount or the end of the last one (`Session.mark`).
Otherwise whoever has the image open gets ESTALE.

The count of opens may be too high after a crash, never too low, as that would close an image which is still in use.
Each open() has a handle that no other one gets, in any server of the mount, and both it and its release() are noted
before the kernel hears of them. A release() that the kernel repeats, because the server died before it answered, names
a handle that is not there any more, and counts nothing. An open() that it repeats gets another handle, and nobody
releases the first one: a server that dies between note and answer, some microseconds, leaves such a one. What it costs:
an overlay that is removed later is not closed before the end of the mount, --until-streamed does not end it, and the
image cannot be released.

Servers of an earlier format gave the inode as the handle of every open(), and told their number. Such a release() is
noted after the answer, as a repeated one cannot be told from another.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping

from qedfs.mount.held import HolderLink
from qedfs.mount.served import Served

_NOTHING: Mapping[str, str] = {}


class InodeNumbers:
    """The numbers of one mount. `values`: what an earlier server has told of them."""

    def __init__(self, link: HolderLink, values: Mapping[str, str] = _NOTHING) -> None:
        self._link = link
        self._next = int(values.get("next-inode", 2))  # 1 is the root
        # (name, inode of the file) -> (number, marks), of images that were not opened again yet.
        self._left: dict[tuple[str, int], tuple[int, list[str]]] = {}
        self._opens: dict[int, int] = {}  # by number, those without a handle of their own
        self._handles: dict[int, set[int]] = {}  # by number
        # Handles of earlier servers are lower: none has given one in each microsecond.
        self._next_handle = time.monotonic_ns() // 1000
        for key, value in values.items():
            kind, _, number = key.partition("/")
            if kind == "image":
                name, file, marks = json.loads(value)
                self._left[name, file] = int(number), marks
            elif kind == "opens":
                self._opens[int(number)] = int(value)
            elif kind == "open":
                self._handles.setdefault(int(value), set()).add(int(number))

    def _fresh(self) -> int:
        """A number that was never used."""
        number, self._next = self._next, self._next + 1
        self._link.set("next-inode", str(self._next))
        return number

    def admit(self, served: Served) -> None:
        """An image was opened: give it the number and the opens that it had in an earlier server, or a new number."""
        if served.image is None:
            return
        number, marks = self._left.pop((served.name, served.stamp[0]), (0, []))
        if any(served.image.overlay.found_mark.startswith(mark) for mark in marks):
            served.inode, served.handles = number, self._handles.pop(number, set())
            served.opens = self._opens.pop(number, 0) + len(served.handles)
            # Of an image that was activated, nobody knows whether its pages were dropped before the crash.
            served.stale_pages = bool(served.image.overlay.record.standby)
        else:
            served.inode = self._fresh()
        self.note(served)

    def note(self, served: Served) -> None:
        """Tell the next server of an image."""
        if self._link and served.image is not None:
            marks = [mark for mark in served.image.overlay.marks() if mark]
            self._link.set(f"image/{served.inode}", json.dumps([served.name, served.stamp[0], marks]))

    def note_closed(self, served: Served) -> None:
        """Tell the next server of an image that was closed for it."""
        if self._link and served.image is not None and served.image.writable:
            value = json.dumps([served.name, served.stamp[0], [served.image.overlay.mark()]])
            self._link.set(f"image/{served.inode}", value)

    def opened(self, served: Served) -> int:
        """Tell the next server of an open(). Returns its handle."""
        handle = self._next_handle
        self._next_handle += 1
        served.handles.add(handle)
        if self._link:
            self._link.set(f"open/{handle}", str(served.inode))
        return handle

    def released(self, handle: int, served: Served | None = None) -> None:
        """Tell the next server of a release(). `served`: None if the handle belongs to none that is open here.

        It may be of an image that an earlier server had, and that will be opened again: its overlay is locked just now.
        """
        for handles in self._handles.values() if served is None else (served.handles,):
            handles.discard(handle)
        if self._link:
            self._link.drop(f"open/{handle}")

    def note_opens(self, served: Served) -> None:
        """Tell the next server how many opens without a handle of their own are left."""
        if self._link:
            self._link.set(f"opens/{served.inode}", str(served.opens - len(served.handles)))

    def forget(self, served: Served) -> None:
        """The image has no users any more. Its stream's orders (`stream_orders.py`) are forgotten with it."""
        for kind in ("image", "opens", "stream", "failed"):
            self._link.drop(f"{kind}/{served.inode}")
