"""Serves one mount from start to stop: the nursery, the readiness, the order of stopping.

Owns the life of everything else. Order of starting: overlays are opened, then the file system is mounted, then the
control socket listens, then `ready` is called. Order of stopping: the file system goes first, so that no request comes
any more; then each overlay is flushed and closed; then the connections are dropped.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pyfuse3
import trio

from qedfs.control.monitoring.metrics_server import Address, serve_metrics
from qedfs.control.port import Mounted
from qedfs.control.qmp.server import serve_control
from qedfs.errors import InUse, QedfsError, UsageError
from qedfs.fetch.queue import FetchQueue
from qedfs.host import descriptors
from qedfs.host.runtime import SOCKET_NAME, place_of, serving_folder
from qedfs.mount import exit_report, fuse_wait, memory
from qedfs.mount.abandoned_reads import release_abandoned_reads
from qedfs.mount.fuse import Operations, forget_name
from qedfs.mount.fuse_init import MAX_BACKGROUND
from qedfs.mount.images import Images
from qedfs.mount.kernel_tuning import tune
from qedfs.mount.mountinfo import MountInfo, mount_info_at
from qedfs.mount.notify import Notifier
from qedfs.mount.options import Options
from qedfs.mount.served import Served
from qedfs.mount.signals import dump_on_signal, stop_on_signal
from qedfs.mount.until_streamed import until_streamed

log = logging.getLogger(__name__)

RESCAN_SECONDS = 1.0
FORCED_SECONDS = 0.2  # from the cut of the connection to the end of the mount by umount -f
# Requests in work at once over all images: those that wait for a dead source must not keep others from being read. More
# than the kernel has of reads in flight: the others, like names, attributes and writes, it sends without a bound.
MAX_TASKS = 2 * MAX_BACKGROUND
MIN_TASKS = 16  # idle workers kept: below, pyfuse3 starts and ends a task per request


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """What to mount, where and how."""

    source: str
    mountpoint: str
    options: Options
    allow_other: bool = False
    until_streamed: bool = False
    metrics: Address | None = None


class Mount:
    """The running mount, as the control side sees it."""

    def __init__(self, settings: Settings, images: Images, socket: Path) -> None:
        self.settings = settings
        # Looked up now: once mounted, a look at the mountpoint is a request to ourselves.
        self.mountpoint = os.path.realpath(settings.mountpoint)
        self.socket = socket
        self.images = images
        self.standing: MountInfo | None = None  # our file system, once it is mounted
        self.failure: QedfsError | None = None  # why it does not end well, by the overlays apart
        self._quit = trio.Event()

    @property
    def device(self) -> str:
        """Which file system this is, in the kernel's tables of mounts; "" if they cannot be read."""
        return "" if self.standing is None else self.standing.device

    def everything(self) -> list[Served]:
        """All overlays that were found."""
        return self.images.registry.everything()

    def fetches(self) -> list[FetchQueue]:
        """The fetch queues in use."""
        return self.images.sources.fetches()

    async def rescan(self) -> None:
        """Look into the folder again."""
        await self.images.registry.look()

    def quit(self) -> None:
        """Begin to stop."""
        self._quit.set()

    async def stopping(self) -> None:
        """Wait until somebody wants us to stop."""
        await self._quit.wait()


async def serve(settings: Settings, ready: Callable[[Mounted], None]) -> None:
    """Mount and serve until the file system is unmounted or a signal comes; `ready` is called when it serves.

    Raises:
        UsageError: the source or the mountpoint is not there or not usable.
        InUse: the mountpoint or the single overlay is busy.
        QedfsError: the single overlay cannot be served; with `until_streamed`, an overlay cannot complete; the
            connection to the kernel was cut; or the last flush of an overlay failed (NoSpace: for want of room).
    """
    _check_mountpoint(settings)
    with serving_folder(settings.mountpoint) as home:
        await _serve(settings, ready, home)


async def _serve(settings: Settings, ready: Callable[[Mounted], None], home: Path) -> None:
    descriptors.raise_limit()
    memory.set_up()
    exit_report.take(settings.mountpoint)  # those of an earlier mount, which nobody has asked for
    notifier = Notifier()
    async with trio.open_nursery() as nursery:
        # What runs here also runs while the overlays are being closed.
        nursery.start_soon(notifier.watchdog)
        images = Images(settings.source, settings.options, nursery, forget=forget_name)
        try:
            await images.registry.scan()
            mount = Mount(settings, images, home / SOCKET_NAME)
            await nursery.start(stop_on_signal, mount.quit)
            nursery.start_soon(dump_on_signal, mount.fetches)
            await _serve_mounted(mount, ready, notifier)
        finally:
            with trio.CancelScope(shield=True):
                lost = await images.close()
                exit_report.take(settings.mountpoint)
        nursery.cancel_scope.cancel()
    if lost:
        error = _summed_up(lost)
        exit_report.leave(settings.mountpoint, error)
        raise error
    if mount.failure is not None:
        raise mount.failure.fresh()


def _summed_up(errors: list[QedfsError]) -> QedfsError:
    """One error for all: whoever ends a mount gets one line and one exit code."""
    if len(errors) == 1:
        return errors[0]
    return type(errors[0])(f"{errors[0]}; and {len(errors) - 1} more overlays, which the log names")


async def _serve_mounted(mount: Mount, ready: Callable[[Mounted], None], notifier: Notifier) -> None:
    fuse_wait.install()
    _mount(mount)
    exit_report.begin(mount.settings.mountpoint)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_answer_kernel, mount)
            nursery.start_soon(_rescan, mount)
            nursery.start_soon(memory.give_back_memory, mount.images.sources.buffers)
            nursery.start_soon(
                release_abandoned_reads, mount.images.registry.images, mount.mountpoint, lambda: _stands(mount)
            )
            await nursery.start(serve_control, mount.socket, mount)
            if mount.settings.metrics is not None:
                await nursery.start(serve_metrics, mount.settings.metrics, mount)
            await trio.to_thread.run_sync(
                tune, mount.mountpoint, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1)
            )
            log.info("serving %s at %s", mount.images.folder.source, mount.mountpoint)
            ready(mount)
            notifier.ready()
            nursery.start_soon(notifier.tell_status, mount.everything)
            if mount.settings.until_streamed:
                nursery.start_soon(_quit_when_streamed, mount)
            await mount.stopping()
            notifier.stopping()
            _tell_whom_it_leaves(mount)
            nursery.cancel_scope.cancel()
    finally:
        _end(mount)


def _tell_whom_it_leaves(mount: Mount) -> None:
    """Say which images are taken from somebody: a signal ends a mount that is in use, where `qedfs umount` refuses."""
    names = [served.name for served in mount.everything() if served.opens] if _stands(mount) else []
    if names:
        log.warning("%s: still open; whoever has it open gets errors from now on", ", ".join(names))


def _end(mount: Mount) -> None:
    """Take our file system away: libfuse unmounts whatever is mounted at the path, and so may do it only if we are."""
    if not _stands(mount) and _standing_at(mount.mountpoint) is not None:
        log.warning("%s: another file system is mounted there now; it is left alone", mount.mountpoint)
    # Where the kernel's table cannot be read nobody can tell; a mount that stays would be a dead one.
    pyfuse3.close(unmount=mount.standing is None or _stands(mount))
    # libfuse takes a connection that was cut for a mount that is gone.
    if _stands(mount) and _is_left_over(mount.mountpoint):
        _take_away(mount)


async def _answer_kernel(mount: Mount) -> None:
    """Ends when the file system has been unmounted from outside, or its connection to the kernel was cut."""
    await pyfuse3.main(min_tasks=MIN_TASKS, max_tasks=MAX_TASKS)
    if _stands(mount):
        # umount -f cuts the connection first, and unmounts a moment later unless somebody has a file open.
        await trio.sleep(FORCED_SECONDS)
    if _stands(mount):
        mount.failure = QedfsError(
            f"{mount.mountpoint}: its connection to the kernel was cut, by umount -f or through "
            "/sys/fs/fuse/connections; the mount is taken away"
        )
    mount.quit()


async def _rescan(mount: Mount) -> None:
    """Notice overlays that come and go. A look costs one fstat while the folder does not change and all are served."""
    while True:
        await trio.sleep(RESCAN_SECONDS)
        try:
            await mount.images.registry.rescan(broken=True)
        except (OSError, QedfsError) as exc:
            log.warning("cannot look into %s: %s", mount.images.folder.source, exc)


async def _quit_when_streamed(mount: Mount) -> None:
    failure = await until_streamed(mount.images.registry)
    mount.failure = mount.failure or failure
    mount.quit()


def _mount(mount: Mount) -> None:
    # fsname is what /proc/mounts shows: the folder, never a URL. Commas separate options there.
    name = mount.images.folder.source.encode("ascii", "replace").decode().replace(",", "?").replace("\\", "?")
    options = {f"fsname={name}", "subtype=qedfs", "default_permissions", "nosuid", "nodev"}
    if mount.settings.allow_other:
        options.add("allow_other")
    if mount.settings.options.read_only:
        options.add("ro")
    before = _standing_at(mount.mountpoint)
    try:
        pyfuse3.init(Operations(mount.images.registry, mount.images.folder), mount.mountpoint, options)
        mount.standing = _standing_at(mount.mountpoint)
    except BaseException as exc:
        # The kernel may have mounted it all the same: fusermount3 has, when we cannot take its descriptor. Without us
        # it would be a dead mount, and with us one that hangs: hence no question to it.
        if _standing_at(mount.mountpoint) != before:
            _take_away(mount)
        if not isinstance(exc, RuntimeError):
            raise
        why = why_not_mounted(mount.mountpoint, allow_other=mount.settings.allow_other)
        raise QedfsError(f"cannot mount on {mount.mountpoint}: {why}") from exc


def _take_away(mount: Mount) -> None:
    done = unmount(mount.mountpoint, lazy=True)
    if done.returncode:
        log.error("%s: cannot be unmounted: %s", mount.mountpoint, done.stderr.strip())


def _stands(mount: Mount) -> bool:
    """Whether the mountpoint shows our file system."""
    return mount.standing is not None and _standing_at(mount.mountpoint) == mount.standing


def _standing_at(place: str) -> MountInfo | None:
    try:
        return mount_info_at(place)
    except (OSError, ValueError, LookupError) as exc:  # whatever is in the table, a mount must come to its end
        log.warning("cannot look what is mounted at %s: %s", place, exc)
        return None


def why_not_mounted(mountpoint: str, *, allow_other: bool) -> str:
    """The likely reason, for a line: libfuse tells its own to nobody but standard error, which a daemon has not."""
    if not os.path.exists("/dev/fuse"):
        return "there is no /dev/fuse; is the kernel's module fuse loaded?"
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "/dev/fuse may not be opened by this user"
    if not os.access(mountpoint, os.W_OK):
        return "this user may not write to that folder; mount on one of your own"
    hint = "; is user_allow_other set in /etc/fuse.conf?" if allow_other and os.getuid() else ""
    return f"libfuse says why on standard error{hint}"


def _check_mountpoint(settings: Settings) -> None:
    mountpoint = settings.mountpoint
    try:
        busy = os.path.ismount(mountpoint)
        is_folder = os.path.isdir(mountpoint)
    except OSError:
        busy = is_folder = False
    if _is_left_over(mountpoint):
        raise InUse(f"{mountpoint}: a mount whose server has died is there; run: qedfs umount {mountpoint}")
    if busy:
        raise InUse(f"{mountpoint}: something is mounted there already; unmount it or choose another folder")
    if not is_folder and os.path.lexists(mountpoint):
        raise UsageError(f"{mountpoint}: is not a folder; name the overlay first, then the folder to mount on")
    if not is_folder:
        raise UsageError(f"{mountpoint}: there is no such folder; make it first: mkdir -p {mountpoint}")
    if os.path.realpath(mountpoint) == os.path.realpath(settings.source):
        raise UsageError(f"{mountpoint}: holds the overlays; mount on another folder")


def _is_left_over(mountpoint: str) -> bool:
    try:
        # Not stat: the kernel would answer it from what the dead server said a moment ago.
        os.statvfs(mountpoint)
    except OSError as exc:
        return exc.errno == errno.ENOTCONN
    return False


def unmount(mountpoint: str, *, lazy: bool = False) -> subprocess.CompletedProcess[str]:
    """Run the system's unmount command: umount for root, fusermount3 for others. Asks nothing of the mount."""
    place = place_of(mountpoint)
    if os.getuid() == 0:
        # -c: umount(8) would look at the mountpoint, and hang with its server.
        command = ["umount", "-c", *(["-l"] if lazy else []), "--", place]
    else:
        command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", place]
    # "busy" is looked for in what it says; the path in there may be in no encoding.
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        return subprocess.run(  # noqa: S603 - no shell
            command, capture_output=True, text=True, errors="surrogateescape", env=environment, check=False
        )
    except OSError as exc:  # no such program, or nothing left to start one with
        return subprocess.CompletedProcess(command, 127, "", f"{command[0]}: {exc.strerror}")
