"""What `qedfs umount` does, without click.

Owns the order: note which process serves, unmount, wait for its end, exit with its error; and the ways out if there is
no such process, or if the mount is busy. Must not know how a server closes its images (`mount/server.py`).
"""

from __future__ import annotations

import math
import os
import select
import time
from collections.abc import Sequence
from typing import Any

from qedfs.cli.mount_table import FILESYSTEM, copies, holders, mounted_at, mounted_type, not_served, not_unmounted
from qedfs.cli.ui.layout import listed
from qedfs.cli.ui.output import remark
from qedfs.control.qmp.client import Client, Gone, NotServed
from qedfs.errors import InUse, TimedOut
from qedfs.host.procfs import waits_for_disk
from qedfs.host.runtime import RuntimeFolder, is_held, mount_places
from qedfs.mount import exit_report
from qedfs.mount.mountpoint import MountInfo, is_dead, unmount
from qedfs.units import format_seconds

SILENCE_SECONDS = 10.0  # wait this long for a server before telling the user; a flush takes less
GRACE_SECONDS = 1.0  # wait this long before asking the server why it has not ended; most end in some 10 ms
RELEASE_LOOK_SECONDS = 0.02  # between two checks whether a server has released its folder
BUSY_SECONDS = 0.5  # between two attempts to unmount a busy mount


def umount(mountpoint: str, *, wait_seconds: float = 0.0, if_mounted: bool = False) -> None:
    """See the command's help."""
    mountpoint = os.path.abspath(mountpoint)
    os.chdir("/")  # our own working directory may be in the mount and keep it busy
    _unmount_when_free(mountpoint, wait_seconds, if_mounted=if_mounted)


def _unmount_when_free(mountpoint: str, wait_seconds: float, *, if_mounted: bool) -> None:
    deadline = time.monotonic() + wait_seconds
    said = ""
    while True:
        try:
            _unmount_and_wait(mountpoint, deadline, if_mounted=if_mounted)
        except InUse as exc:
            left = deadline - time.monotonic()
            if left <= 0:
                raise
            if str(exc) != said:
                said = str(exc)
                remark(f"{said}; waiting for that, for {format_seconds(left)} at most")
            time.sleep(min(BUSY_SECONDS, left))
        else:
            return


def _unmount_and_wait(mountpoint: str, deadline: float, *, if_mounted: bool) -> None:
    # Before the unmount, because the mount shows its owner, and so where the server's folder is.
    places = list(mount_places(mountpoint))
    try:
        # No reply is needed, as the server may be busy or stopped: the connection only tells which process it is.
        client = Client.reach(mountpoint)
    except NotServed:
        _end_unserved(mountpoint, places, if_mounted=if_mounted)
        return
    except TimedOut as exc:
        _unmount(mountpoint, served=True)
        raise TimedOut(
            f"{mountpoint}: is unmounted, but its server accepts no client, so it may still have the overlays open"
        ) from exc
    with client:
        process = _process(client)
        try:
            mounted = mounted_at(mountpoint)
            if mounted is not None:  # otherwise a copy keeps its server running, or it is about to end
                _unmount(mountpoint, served=True)
            if not _has_ended(process, GRACE_SECONDS):
                _ask_to_end(mountpoint, client, process, mounted, deadline)
            _wait_for_end(mountpoint, client, process)
        finally:
            if process is not None:
                os.close(process)
    # The connection may end before the server does, and a server that was killed may have another one after it.
    _wait_until_released(mountpoint, places)
    _exit_as_reported(mountpoint, places)


def _end_unserved(mountpoint: str, places: Sequence[RuntimeFolder], *, if_mounted: bool) -> None:
    """Unmount a mount without a reachable server: it has died, it is already ending, or there is no mount."""
    absent = mounted_type(mountpoint) is None
    if not absent:
        _unmount(mountpoint)
    _wait_until_released(mountpoint, places)
    _exit_as_reported(mountpoint, places, but_killed=not absent)
    if absent and not if_mounted:
        raise not_served(mountpoint)


def _wait_until_released(mountpoint: str, places: Sequence[RuntimeFolder]) -> None:
    """Wait for a server that cannot be contacted. It holds its folder until it has closed the overlays.

    A server that is just starting holds it as well. This wait then ends once it has mounted.
    """
    said = time.monotonic() + SILENCE_SECONDS
    while any(map(is_held, places)) and mounted_at(mountpoint) is None:
        if time.monotonic() > said:
            remark(f"{mountpoint}: is not mounted; waiting for its server to close the overlays")
            said = math.inf
        time.sleep(RELEASE_LOOK_SECONDS)


def _exit_as_reported(mountpoint: str, places: Sequence[RuntimeFolder], *, but_killed: bool = False) -> None:
    """Exit with the code that the server has reported, if the mount ended with an error.

    `but_killed`: ignore a report that the server was killed, because a dead mount was found and removed.
    """
    report = exit_report.read_once(mountpoint, places)
    if report is not None and not (report.killed and but_killed):
        remark(report.error)
        raise SystemExit(report.exit_code)


def _process(client: Client) -> int | None:
    """A descriptor of the serving process, which becomes readable when the process ends."""
    try:
        return os.pidfd_open(client.server_pid)
    except OSError:
        return None


def _unmount(mountpoint: str, *, served: bool = False) -> None:
    """Unmount. `served`: the server is alive. It may be stopped, so no request is sent to the mount."""
    if mounted_type(mountpoint) != FILESYSTEM:
        raise not_served(mountpoint)
    done = unmount(mountpoint)
    if done.returncode and not served and is_dead(mountpoint):
        done = unmount(mountpoint, lazy=True)
    if done.returncode == 0:
        return
    if "busy" in done.stderr.lower():
        raise InUse(f"{mountpoint}: is in use{_by_whom(mountpoint)}; close it there first")
    raise not_unmounted(mountpoint, done.stderr.strip())


def _has_ended(process: int | None, seconds: float) -> bool:
    return process is not None and bool(select.select([process], [], [], seconds)[0])


def _ask_to_end(
    mountpoint: str, client: Client, process: int | None, mounted: MountInfo | None, deadline: float
) -> None:
    """End a server that keeps running after the unmount, because there are copies of its mount elsewhere.

    A copy that is in use, or that is visible here, is left for its users to unmount. Other copies are in namespaces
    where nobody will unmount them: containers and sandboxed services inherited them unasked. They end with the server.

    `mounted`: the file system that was mounted here until now; None if it had been unmounted before.

    Raises:
        InUse: the server keeps running for a copy.
    """
    try:
        client.deadline = time.monotonic() + SILENCE_SECONDS
        client.negotiate()
        # Without the device number we could not recognize copies, and would consider all of them unused. After the end
        # of its FUSE session the server reports no number, because there are no copies any more.
        device = str(client.execute("x-qedfs-status").get("device", ""))
        mounted = mounted or MountInfo(device, FILESYSTEM, b"")
        if _wait_for_users(mountpoint, client, mounted, deadline) and _has_ended(process, GRACE_SECONDS):
            return
        _, holders = copies(mounted)
        client.execute("quit")
    except (Gone, TimedOut):
        return  # it is ending already, or is stopped, so all we can do is wait for it
    finally:
        client.deadline = math.inf
    whose = f"of {listed(holders)}" if holders else "that cannot be seen from here"
    remark(f"{mountpoint}: a mount namespace {whose} has a copy of it, which ends with the server")


def _wait_for_users(mountpoint: str, client: Client, mounted: MountInfo, deadline: float) -> bool:
    """Wait until no copy of the mount is in use. Returns whether one was. Raises InUse after the deadline.

    Even without a visible copy an image may be open for a moment, if its reader was killed and the server is about to
    release it.
    """
    begun, said = time.monotonic(), ""
    while used := _use_of_copies(client, mounted):
        sure = not mounted.device or any(copies(mounted))  # it goes on for longer than any killed reader
        left = (deadline if sure else max(deadline, begun + SILENCE_SECONDS)) - time.monotonic()
        if left <= 0:
            raise InUse(f"{mountpoint}: is unmounted, but {used}; its server keeps running until then")
        if sure and used != said:
            remark(f"{mountpoint}: is unmounted, but {used}; waiting for that, for {format_seconds(left)} at most")
        said = used
        time.sleep(BUSY_SECONDS)
        client.deadline = time.monotonic() + SILENCE_SECONDS
    return bool(said)


def _use_of_copies(client: Client, mounted: MountInfo) -> str:
    """Who uses the copies of a mount, in words; "" if nobody does."""
    places, holders = copies(mounted)
    if places:
        return f"is still mounted at {listed(places)}"
    images: list[dict[str, Any]] = client.execute("x-qedfs-status")["images"]
    names = [image["name"] for image in images if image.get("opens")]
    if not names:
        return ""
    whose = f"of {listed(holders)}" if holders else "that cannot be seen from here"
    return f"{listed(names)} is open in a copy of it, in a mount namespace {whose}"


def _wait_for_end(mountpoint: str, client: Client, process: int | None) -> None:
    """Wait until the overlays are closed, which is when the process ends. The connection ends a little earlier."""
    if process is not None:
        if not _has_ended(process, SILENCE_SECONDS):
            why = ", for which a disk, or a frozen file system, does not answer" * waits_for_disk(client.server_pid)
            remark(f"{mountpoint}: is unmounted; waiting for server pid {client.server_pid} to close the overlays{why}")
            select.select([process], [], [])
        return
    try:
        while True:
            client.event(60.0)
    except Gone:
        return


def _by_whom(mountpoint: str) -> str:
    found = holders(mountpoint)
    if not found:
        return ""
    return f" by {listed(found)}"
