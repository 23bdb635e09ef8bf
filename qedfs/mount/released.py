"""The overlay files that a mount has released or is about to release, and leaves alone from then on.

Owns the list, and what the next server has to know of it (`held.py`). Must not know how an image is released.

A file is known by its inode number. A descriptor with O_PATH, which is no open file and takes no lock, keeps the file
system from giving this number to another file. So an overlay that is created later under the same name is served.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping

from qedfs.errors import Inaccessible
from qedfs.mount.held import HolderLink
from qedfs.mount.overlay_folder import OverlayFolder
from qedfs.mount.served import Served

_KEY = "release/"


@dataclasses.dataclass(frozen=True, slots=True)
class _File:
    name: str  # of the image
    path: str  # of the overlay
    fd: int  # keeps its inode number


class Released:
    """The files of one mount. `values`: what an earlier server has told of them."""

    def __init__(self, folder: OverlayFolder, link: HolderLink, values: Mapping[str, str]) -> None:
        self._folder = folder
        self._link = link
        self._files: dict[int, _File] = {}
        self._ordered: set[tuple[str, int]] = set()  # name and inode of images that the earlier server was to release
        for key, value in values.items():
            if not key.startswith(_KEY):
                continue
            number = int(key.removeprefix(_KEY))
            name, path, done = json.loads(value)
            if not done:
                self._ordered.add((name, number))
                continue
            try:
                file = self._files[number] = self._opened(name, path)
                known = os.fstat(file.fd).st_ino == number
            except OSError:
                self._link.drop(key)  # nothing keeps its number any more, so another file may get it
                continue
            if not known:
                self.forget(name)

    def close(self) -> None:
        """Close the descriptors."""
        for file in self._files.values():
            os.close(file.fd)
        self._files.clear()

    def overlays(self) -> dict[str, str]:
        """The overlay of each image that was released, by the name of the image."""
        return {file.name: file.path for file in self._files.values()}

    def __contains__(self, status: os.stat_result) -> bool:
        """Whether the file with this status was released, whatever its name is now."""
        return status.st_ino in self._files

    def is_ordered(self, served: Served) -> bool:
        """Whether an earlier server was to release this image, and has not done so."""
        return (served.name, served.stamp[0]) in self._ordered

    def note_order(self, served: Served) -> None:
        """Tell the next server that it has to release an image if we do not."""
        self._tell(served, done=False)

    def take_back(self, served: Served) -> None:
        """Forget such an order."""
        self._ordered.discard((served.name, served.stamp[0]))
        self._link.drop(f"{_KEY}{served.stamp[0]}")

    def add(self, served: Served) -> None:
        """Leave the file of an image alone from now on. Call it while that is open. Raises Inaccessible."""
        try:
            file = self._opened(served.name, served.path)
        except OSError as exc:
            raise Inaccessible(f"{served.path}: {exc.strerror}") from exc
        if os.fstat(file.fd).st_ino != served.stamp[0]:
            os.close(file.fd)
            raise Inaccessible(f"{served.path}: is another file now")
        self._files[served.stamp[0]] = file

    def note_done(self, served: Served) -> None:
        """Tell the next server that an image was released.

        Not before it is closed: a server that takes over in between closes it in order, as the order is still there.
        """
        self._ordered.discard((served.name, served.stamp[0]))
        self._tell(served, done=True)

    def forget(self, name: str) -> bool:
        """Serve the overlay of this image again, from the next scan on. Returns whether it was released."""
        for number, file in self._files.items():
            if file.name == name:
                self._drop(number)
                return True
        return False

    def keep_only(self, numbers: Iterable[int]) -> None:
        """Forget files that are not among those with these inode numbers: they have left the folder."""
        for number in self._files.keys() - set(numbers):
            self._drop(number)

    def _drop(self, number: int) -> None:
        os.close(self._files.pop(number).fd)
        self._link.drop(f"{_KEY}{number}")

    def _tell(self, served: Served, *, done: bool) -> None:
        self._link.set(f"{_KEY}{served.stamp[0]}", json.dumps([served.name, served.path, done]))

    def _opened(self, name: str, path: str) -> _File:
        flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
        return _File(name, path, os.open(os.path.basename(path), flags, dir_fd=self._folder.fd))
