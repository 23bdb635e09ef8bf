"""The order of a migration: check, serve the disk, move the memory, cut over, go on, tidy up; and each way back.

Owns who has the disk at each moment. The source has it until the destination's mount is cut over, and gets it back only
if the mount agrees to return to standby, which it refuses once a guest has written. So after the last step has failed,
the guest runs on at the source only if it was certainly nowhere else. Must not know QMP: `two_qemus.py` and
`moved_image.py` speak it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from qedfs.cli.migration.disk_export import DiskExport
from qedfs.cli.migration.moved_disk import MovedDisk, has_disk_on
from qedfs.cli.migration.moved_image import MovedImage
from qedfs.cli.migration.two_qemus import Lost, TwoQemus
from qedfs.cli.served_images import Image
from qedfs.errors import QedfsError, UsageError

Say = Callable[[str], None]
Show = Callable[[dict[str, Any]], None]  # gets what QEMU says of the migration
ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # signals that end this command


@dataclasses.dataclass
class Outcome:
    """How it went. Times in seconds; None if it did not come to that."""

    guest: str = "source"  # where it runs: "source", "destination", or "stopped"
    export_pid: int | None = None  # of the qemu-nbd that still serves the source's disk
    stopped_seconds: float | None = None
    switch_seconds: float | None = None  # since the migration began, until the guest ran at the destination
    memory_free_seconds: float | None = None
    disk_complete_seconds: float | None = None

    def as_json(self) -> dict[str, Any]:
        """The object that --json prints, without the error."""
        return dataclasses.asdict(self)


class Handover:
    """One migration."""

    def __init__(self, image: MovedImage, disk: MovedDisk, qemus: TwoQemus, say: Say) -> None:
        self._image = image
        self._disk = disk
        self._qemus = qemus
        self._say = say
        self._began = time.monotonic()
        self._export: DiskExport | None = None
        self.outcome = Outcome()

    # Before anything is changed

    def check(self) -> None:
        """Look at everything that can be looked at while the guest runs."""
        if self._image.size != self._disk.size:
            raise UsageError(f"{self._image}: has {self._image.size} bytes, but {self._disk} has {self._disk.size}")
        self._qemus.check()
        if not has_disk_on(self._qemus.destination, str(self._image)):
            raise UsageError(f"{self._qemus.destination.peer}: has no disk on the image {self._image}")

    def serve(self, export: str, listen: Sequence[str]) -> None:
        """Start the server of the source's disk."""
        self._export = DiskExport.start(self._disk.path, self._disk.driver, listen, export)
        self.outcome.export_pid = self._export.pid

    def try_connection(self) -> None:
        """Let the mount connect to its source and compare sizes, as the cut-over will do it. Nothing is changed."""
        self._image.check_ready()

    # The guest moves

    def move(self, deadline: float, show: Show, again: Callable[[], None]) -> None:
        """Move the guest. On any failure before the last step it runs on at the source.

        `again`: restarts the server of a disk that is not raw. Such a format has tables, and a server that read them
        while they still changed has old ones in its cache.
        """
        self._began = time.monotonic()
        with contextlib.ExitStack() as stack:
            try:
                self._qemus.prepare()
                self._qemus.start()
                self._qemus.wait_stopped(deadline, show)
                # The guest stands still, and only one of the two may resume it. Ctrl-C waits until that is decided.
                stack.enter_context(_undisturbed())
            except BaseException:
                with _undisturbed():  # a second signal must not leave the guest standing still
                    self._qemus.cancel()
                raise
            try:
                if self._export is not None and self._disk.driver != "raw":
                    self.end_export()
                    again()
                self._image.cut_over()
            except BaseException:
                self._qemus.cancel()
                # After the guest runs again: this takes long if it is the mount that does not answer.
                self._way_back()
                raise
            self._go_on()

    def _go_on(self) -> None:
        try:
            self._qemus.go_on()
        except Lost:
            self.outcome.guest = "stopped"
            self._take_back()
            raise
        self.outcome.guest = "destination"
        self.outcome.switch_seconds = self._qemus.resumed_at - self._began
        self.outcome.stopped_seconds = self._qemus.resumed_at - self._qemus.stopped_at

    # The ways back

    def _way_back(self) -> None:
        """Put the image back into standby, so that the next migration can cut over again."""
        try:
            self._image.way_back()
        except QedfsError as exc:
            self._say(f"{self._image}: cannot go back to standby: {exc}; see activate --undo")

    def _take_back(self) -> None:
        """The guest did not come up at the destination. If it has written nothing there, the source has all of it."""
        if self._qemus.has_failed():
            self._qemus.cancel()
            self.outcome.guest = "source"
            # The destination may have received the whole guest nevertheless.
            if not self._qemus.end_destination():
                self._say("it is not certain that the guest does not run at the destination, too: end its QEMU")
            self._way_back()
            return
        if not self._qemus.end_destination():
            self._say("the guest may still come up at the destination, so it stands still at the source")
            return
        try:
            self._image.way_back()
        except QedfsError as exc:
            self._say(f"the guest stands still at the source, since the image may have been written to: {exc}")
            return
        # From here on the mount refuses writes.
        self._qemus.cancel()
        self.outcome.guest = "source"
        self._say("the guest runs on at the source; nothing was written at the destination")

    # The guest has moved

    def free_memory(self, show: Show) -> None:
        """End the source's QEMU as soon as all memory has left it, and keep others from writing to its disk."""
        try:
            self._qemus.wait_completed(show)
        except Lost:
            self.outcome.guest = "stopped"
            raise
        # Before the QEMU ends. It gave up its locks a moment ago, so hardly anybody else can have taken them since.
        if self._export is not None:
            self._export.guard()
        self._qemus.quit_source()
        self.outcome.memory_free_seconds = time.monotonic() - self._began

    def wait_disk(self, show: Callable[[list[Image]], None]) -> None:
        """Return when the image is complete. Raises the error that has stopped its stream."""
        self._image.wait_complete(show, self._say)
        self.outcome.disk_complete_seconds = time.monotonic() - self._began

    def end_export(self) -> None:
        """Stop serving the source's disk, which nobody needs any more."""
        if self._export is not None:
            self._export.end()
            self._export = self.outcome.export_pid = None

    def close(self) -> None:
        """Let go of everything. A server that is needed serves on."""
        if self._export is not None:
            if self.outcome.guest == "source":
                self.end_export()
            else:
                self._export.leave()


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Signals that would end this command are heeded only afterwards.

    They are not blocked: a server that is started meanwhile would inherit the mask, and only SIGKILL could end it.
    """
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in ENDS}
    try:
        for number in ENDS:
            if before[number] is not signal.SIG_IGN:
                signal.signal(number, lambda it, _: came.append(it))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])
