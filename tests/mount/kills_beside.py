"""What is done with a mount until it is killed (`kills.py`), and what has to be there of it afterwards.

Each of them works in a thread of its own, again and again, beside a guest that writes. An answer that the mount has
given is a promise: the next mount has to show it. What was under way at the kill is done or not done, as a whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from qedfs.control.qmp.client import Client
from qedfs.errors import QedfsError
from tests.harness.images import qemu_check
from tests.harness.mounts import Mount
from tests.harness.require import require

from .kills import Broken, Overlay, told_of
from .support import Writer

GROWTHS = (512, 4096, 65536 + 512, 1 << 20)  # bytes; whole clusters of some sizes only
PAUSE_SECONDS = 0.01
SNAPSHOT_SECONDS = 0.15  # between two, as each is compared with the image of every moment


class Beside(Protocol):
    """What is done with one overlay in each round."""

    done: int  # how many the mount has said are done, in all rounds

    def running(self, mount: Mount) -> contextlib.AbstractContextManager[None]:
        """A block in which it is done again and again."""

    def settled(self, mount: Mount) -> None:
        """At the next mount. Raises Broken."""


@contextlib.contextmanager
def repeated(mount: Mount, pause_seconds: float, step: Callable[[Client], None]) -> Iterator[None]:
    """A block beside which `step` is called again and again, until the mount is gone."""
    ended = threading.Event()

    def again() -> None:
        with contextlib.suppress(QedfsError, OSError), Client.connect(str(mount.mountpoint)) as client:
            while not ended.wait(pause_seconds):
                step(client)

    thread = threading.Thread(target=again)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class Growing:
    """The image grows by sizes of all kinds."""

    def __init__(self, overlay: Overlay, seed: int) -> None:
        self.done = 0
        self._expected = overlay.expected
        self._random = random.Random(seed)
        self._answered = self._asked = overlay.expected.stat().st_size

    def running(self, mount: Mount) -> contextlib.AbstractContextManager[None]:
        """See `Beside`."""
        return repeated(mount, PAUSE_SECONDS, self._grow)

    def _grow(self, client: Client) -> None:
        self._asked = self._answered + self._random.choice(GROWTHS)
        client.execute("block_resize", device="disk", size=self._asked)
        self._answered = self._asked
        self.done += 1

    def settled(self, mount: Mount) -> None:
        """The image has the size of the last answer, or that of the request under way. What is new is zeros."""
        found = mount.path("disk.raw").stat().st_size
        if found not in (self._answered, self._asked):
            raise Broken(f"the image has {found} bytes, but {self._answered} were told, and {self._asked} asked for")
        os.truncate(self._expected, found)
        self._answered = self._asked = found


class Moving:
    """The image gets its other source, and back."""

    def __init__(self, urls: tuple[str, str]) -> None:
        self.done = 0
        self._told, self._asked = urls

    def running(self, mount: Mount) -> contextlib.AbstractContextManager[None]:
        """See `Beside`."""
        return repeated(mount, PAUSE_SECONDS, self._move)

    def _move(self, client: Client) -> None:
        client.execute("x-qedfs-source-set", device="disk.raw", url=self._asked, force=True)
        self._told, self._asked = self._asked, self._told
        self.done += 1

    def settled(self, mount: Mount) -> None:
        """The overlay names the source of the last answer, or that of the request under way."""
        image = mount.image()
        found = image["backing"]
        if image["state"] != "complete" and found not in (self._told, self._asked):
            raise Broken(f"the source is {found}, but {self._told} was told, and {self._asked} asked for")
        if found == self._asked:
            self._told, self._asked = self._asked, self._told


class Jobs:
    """A job of this type runs beside the guest, and again as soon as that has ended."""

    def __init__(self, kind: str) -> None:
        self.done = 0
        self._kind = kind

    def running(self, mount: Mount) -> contextlib.AbstractContextManager[None]:
        """See `Beside`."""
        return repeated(mount, PAUSE_SECONDS, self._begin)

    def _begin(self, client: Client) -> None:
        if not client.execute("query-block-jobs"):
            client.execute("x-qedfs-start", device="disk", type=self._kind)
            self.done += 1

    def settled(self, mount: Mount) -> None:
        """The bytes of the image are all that counts."""


class _Taken(NamedTuple):
    """A snapshot. It has at least the first `least` writes of the round, and no more than `most`; None: unknown."""

    path: Path
    least: int
    most: int | None


class Snapping:
    """Snapshots are taken, on a file system that can share blocks. Each is compared, and removed."""

    def __init__(self, overlay: Overlay, raw: Path, seed: int) -> None:
        """`raw`: what the source serves. `seed` + n: of the writes in round n."""
        self.done = 0
        self._overlay = overlay
        self._raw = raw
        self._seed = seed
        self._before = b""
        self._taken: list[_Taken] = []

    def running(self, mount: Mount) -> contextlib.AbstractContextManager[None]:
        """See `Beside`."""
        self._before = self._overlay.expected.read_bytes()
        return repeated(mount, SNAPSHOT_SECONDS, self._take)

    def _take(self, client: Client) -> None:
        path = self._overlay.path.with_suffix(f".snapshot{self.done}")
        self._taken.append(_Taken(path, self._writes(), None))
        client.execute("x-qedfs-snapshot", device="disk", file=str(path))
        self._taken[-1] = self._taken[-1]._replace(most=self._writes())
        self.done += 1

    def _writes(self) -> int:
        return told_of(self._overlay).read_bytes().count(b"\n")

    def settled(self, mount: Mount) -> None:
        """Each that was told is there and whole. One that was under way is whole, or not there."""
        for taken in self._taken:
            if taken.path.exists():
                self._compare(taken._replace(most=self._writes() if taken.most is None else taken.most))
                taken.path.unlink()
            elif taken.most is not None:
                raise Broken(f"seed {self._seed}: {taken.path} is not there, although it was told")
        self._taken.clear()
        self._seed += 1

    def _compare(self, taken: _Taken) -> None:
        """The snapshot is the image after so many writes. Of the next one, it may have a part."""
        if qemu_check(taken.path).corruptions:
            raise Broken(f"seed {self._seed}: qemu-img check finds corruptions in {taken.path}")
        found = self._content(taken.path)
        model = bytearray(self._before)
        writer = Writer(len(model), seed=self._seed)
        for number in range((taken.most or 0) + 2):
            pos, data = writer.next()
            end = pos + len(data)
            if number >= taken.least and found[:pos] == model[:pos] and found[end:] == model[end:]:
                parts = zip(found[pos:end], model[pos:end], data, strict=True)
                if all(byte in (old, new) for byte, old, new in parts):
                    return
            model[pos:end] = data
        raise Broken(f"seed {self._seed}: {taken.path} is the image after no write from {taken.least} to {taken.most}")

    def _content(self, path: Path) -> bytes:
        """What QEMU reads of an overlay over what the source serves."""
        out = path.with_suffix(".raw")
        node = {
            "driver": "qed",
            "file": {"driver": "file", "filename": str(path)},
            "backing": {"driver": "raw", "file": {"driver": "file", "filename": str(self._raw)}},
        }
        argv = [require("qemu-img"), "convert", "-O", "raw", f"json:{json.dumps(node)}", str(out)]
        subprocess.run(argv, check=True, capture_output=True)
        try:
            return out.read_bytes()
        finally:
            out.unlink()
