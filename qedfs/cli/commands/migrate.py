"""`qedfs migrate`: moves a running guest to another QEMU at once; its disk follows.

Owns the options, the connections, the order of the steps for the user, and what is said of each. Must not send QMP
commands, nor know how a step is undone (`cli/migration/`).
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import time
from typing import Any

import click

from qedfs.cli.completion import files, images, mountpoints
from qedfs.cli.given_once import GivenOnce
from qedfs.cli.migration.disk_export import listen_words
from qedfs.cli.migration.handover import ENDS, Handover, Outcome
from qedfs.cli.migration.moved_disk import disk_meant
from qedfs.cli.migration.moved_image import MovedImage
from qedfs.cli.migration.two_qemus import TwoQemus
from qedfs.cli.option_types import DURATION
from qedfs.cli.served_images import Image, connect
from qedfs.cli.ui.output import print_json, remark
from qedfs.cli.ui.progress_lines import ProgressLines
from qedfs.control.qmp.client import Client
from qedfs.control.qmp.qemu import QemuClient
from qedfs.errors import QedfsError, UsageError
from qedfs.source.url import Location
from qedfs.units import format_size

SHOW_SECONDS = 5.0  # between two lines about the memory


@click.command(cls=GivenOnce, short_help="Move a running guest to another host, its disk after it.")
@click.argument("source_qmp", shell_complete=files)
@click.argument("destination_qmp", shell_complete=files)
@click.argument("mountpoint", shell_complete=mountpoints)
@click.argument("image", required=False, shell_complete=images)
@click.option(
    "--to", "uri", required=True, metavar="URI", help="Where the memory goes, as QEMU writes it: tcp:HOST:PORT."
)
@click.option("--disk", metavar="NAME", help="The disk that moves, if the guest has several: its id in QEMU.")
@click.option("--file", metavar="FILE", shell_complete=files, help="The file of that disk, if QEMU does not tell it.")
@click.option(
    "--listen",
    metavar="[HOST:]PORT|SOCKET",
    help="Serve the disk there; by default at the port or socket that the backing of IMAGE names.",
)
@click.option(
    "--no-export", is_flag=True, help="Serve no disk: something else serves it already, with TLS for example."
)
@click.option(
    "--post-copy", is_flag=True, help="Let the guest run at the destination before all of its memory is there."
)
@click.option("--timeout", type=DURATION, metavar="TIME", help="If the memory takes longer, cancel, with exit code 7.")
@click.option("--no-wait", is_flag=True, help="Return when the guest has moved; the disk is served on.")
@click.option("--quiet", "-q", is_flag=True, help="Print no progress and no remarks, only errors.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end, also after a failure.")
def migrate(
    source_qmp: str,
    destination_qmp: str,
    mountpoint: str,
    image: str | None,
    uri: str,
    disk: str | None,
    file: str | None,
    listen: str | None,
    no_export: bool,
    post_copy: bool,
    timeout: float | None,
    no_wait: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Move a running guest from one QEMU to another. Its disk follows.

    The QEMU at DESTINATION_QMP waits for the guest (-incoming defer); its disk is IMAGE of the mount at MOUNTPOINT,
    which is in standby (mount --standby). The command runs on the host of the QEMU at SOURCE_QMP. It serves that one's
    disk with qemu-nbd until the image is complete, and ends that QEMU as soon as the guest has left it.

    SOURCE_QMP and DESTINATION_QMP are paths of Unix sockets or HOST:PORT. For a mount of another host, MOUNTPOINT is
    such an address of its control socket: status --json tells the path there, and ssh -L forwards it.

    After any failure before the guest has moved, it runs on at the source. Once it has moved, an end of this command,
    as by Ctrl-C, does not stop the server of the disk.
    """
    if no_export and listen:
        raise UsageError("--no-export and --listen exclude each other")
    words = _Words(quiet=quiet)
    outcome, error = Outcome(), None
    # Killed while the memory moves, it would leave a guest that stands still at the end, for ever. SIGHUP: the terminal
    # or the connection of ssh has ended.
    for number in ENDS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    try:
        with contextlib.ExitStack() as stack:
            source = stack.enter_context(QemuClient.at(source_qmp))
            moved = disk_meant(source, disk, file)
            # Before the destination's QEMU, which hangs for a while if its disk is no image in standby.
            there = stack.enter_context(contextlib.closing(MovedImage(lambda: _mount_at(mountpoint), image)))
            destination = stack.enter_context(QemuClient.at(destination_qmp))
            qemus = TwoQemus(source, destination, uri, post_copy=post_copy)
            handover = stack.enter_context(contextlib.closing(Handover(there, moved, qemus, words.say)))
            outcome = handover.outcome
            _move(handover, there.backing, words, listen, serve=not no_export, timeout=timeout)
            if not no_wait:
                handover.wait_disk(words.disk)
                handover.end_export()
                words.say("the disk is complete at the destination; at the source it may be deleted")
    except QedfsError as exc:
        error = exc
        raise
    finally:
        if outcome.export_pid is not None and outcome.guest != "source":
            words.say(f"process {outcome.export_pid} still serves the source's disk; end it when the image is complete")
        if as_json and (error is not None or sys.exc_info()[0] is None):
            failure = {"error": error and str(error), "exit_code": error.exit_code if error else 0}
            print_json({**outcome.as_json(), **failure})


def _move(
    handover: Handover, backing: Location, words: _Words, listen: str | None, *, serve: bool, timeout: float | None
) -> None:
    """Until the guest runs at the destination, and the source's memory is free."""
    handover.check()
    if serve and backing.tls:
        raise UsageError(f"the backing is {backing}: serve the disk with TLS yourself, and say --no-export")

    def start_server() -> None:
        handover.serve(backing.export, listen_words(backing, listen))

    if serve:
        start_server()
    handover.try_connection()
    words.say("all is ready; the guest's memory moves")
    handover.move(time.monotonic() + (timeout or math.inf), words.memory, start_server)
    stopped = handover.outcome.stopped_seconds or 0
    words.say(f"the guest runs at the destination; it stood still for {stopped * 1000:.0f} ms")
    handover.free_memory(words.memory)
    words.say("the source's QEMU has ended")


def _mount_at(place: str) -> Client:
    """The server of a mount of this host, or at the address of its control socket."""
    if os.path.isdir(place):
        return connect(place)
    return QemuClient.at(place, name=f"the server of the mount at {place}")


class _Words:
    """What a person gets to see."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._last = time.monotonic()
        self._disk = ProgressLines()

    def say(self, text: str) -> None:
        """Print a line."""
        if not self._quiet:
            remark(text)

    def memory(self, found: dict[str, Any]) -> None:
        """What query-migrate says, now and then."""
        if "ram" in found and time.monotonic() > self._last + SHOW_SECONDS:
            self._last = time.monotonic()
            self.say(f"memory: {format_size(found['ram']['remaining'])} of {format_size(found['ram']['total'])} to go")

    def disk(self, images: list[Image]) -> None:
        """The progress of the stream."""
        line = self._disk.line(time.monotonic(), images)
        if line is not None:
            self.say(line)
