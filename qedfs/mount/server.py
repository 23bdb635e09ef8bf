"""Serves one mount from start to stop.

Owns the nursery and the order of starting and stopping. Must not know how a request is answered (`fuse.py`), how an
image is opened (`opener.py`) or what a command does (`control/`). Start: the overlays are opened, the file system is
mounted, the control socket listens, `ready` is called. Stop: the file system is unmounted, so that no more requests
arrive; each overlay is flushed and closed; the connections to sources are closed.
"""

from __future__ import annotations

import dataclasses
import logging
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import trio

from qedfs.control.monitoring.metrics_address import Address
from qedfs.control.monitoring.metrics_server import serve_metrics
from qedfs.control.port import Mounted, ServedImage
from qedfs.control.qmp.server import serve_control
from qedfs.errors import QedfsError
from qedfs.fetch.queue import FetchQueue
from qedfs.fetch.total_limit import TotalLimit
from qedfs.host import descriptors, oom, scheduling
from qedfs.host.beat import next_beat
from qedfs.host.runtime import SOCKET_NAME, serving_folder
from qedfs.image.growth import grow
from qedfs.mount import exit_report, memory
from qedfs.mount.abandoned_reads import release_abandoned_reads
from qedfs.mount.fuse import Operations, forget_name
from qedfs.mount.fuse_session import FuseSession
from qedfs.mount.held import HolderGone, HolderLink
from qedfs.mount.images import Images
from qedfs.mount.kernel_names import KernelNames
from qedfs.mount.kernel_pages import KernelPages
from qedfs.mount.kernel_tuning import tune, tune_device
from qedfs.mount.mountpoint import check_mountpoint, remove_dead
from qedfs.mount.notify import Notifier
from qedfs.mount.options import Options
from qedfs.mount.served import Served
from qedfs.mount.signals import dump_on_signal, stop_on_signal
from qedfs.mount.snapshot import Snapshot
from qedfs.mount.takeover import HOLDER_KILLED, Restart, Takeover
from qedfs.mount.until_streamed import until_streamed

log = logging.getLogger(__name__)

INFORM_SECONDS = 1.0  # between two looks whether the next server has to know more
NO_HOLDER = HolderLink()


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

    def __init__(self, images: Images, session: FuseSession, takeover: Takeover) -> None:
        self.images = images
        self.session = session
        self.takeover = takeover
        self.failure: QedfsError | None = None  # why the mount has failed, apart from lost writes
        self._quit = trio.Event()

    @property
    def mountpoint(self) -> str:
        """The absolute path of the mountpoint."""
        return self.session.mountpoint

    @property
    def device(self) -> str:
        """The device number of the mounted file system, as in the kernel's tables of mounts; "" if unknown."""
        return self.session.device

    @property
    def restart(self) -> Restart | None:
        """The last change of servers; None if this is the first one."""
        return self.takeover.restart

    async def upgrade(self) -> None:
        """Let another server take the mount over, which is ready when this returns. Raises QedfsError."""
        await self.takeover.upgrade(self.mountpoint)

    @property
    def without_restart(self) -> str:
        """Why a crash of this server ends the mount; "" if another one takes over."""
        return self.takeover.without_restart

    @property
    def without_upgrade(self) -> str:
        """Why no other server can take the mount over; "" if one can."""
        return self.takeover.without_upgrade

    @property
    def without_more(self) -> str:
        """Why lseek(SEEK_DATA) and fallocate are not answered; "" if they are."""
        return self.session.without_more

    def everything(self) -> Sequence[Served]:
        """All overlays in the folder."""
        return self.images.registry.everything()

    def fetches(self) -> list[FetchQueue]:
        """The fetch queues in use, and some that were in use until recently."""
        return self.images.sources.fetches()

    @property
    def total(self) -> TotalLimit:
        """The limit of all images together."""
        return self.images.sources.total

    async def rescan(self) -> None:
        """Scan the folder again. Raises QedfsError."""
        await self.images.registry.rescan()

    async def activate(self, served: ServedImage, *, dry: bool = False) -> None:
        """See `Mounted`."""
        found = self.images.registry.by_name(served.name)
        if found is None:
            raise QedfsError(f"{served.name}: is not there any more")
        await (self.images.cut_over.check(found) if dry else self.images.cut_over.activate(found))

    async def deactivate(self, served: ServedImage) -> None:
        """See `Mounted`."""
        found = self.images.registry.by_name(served.name)
        if found is None:
            raise QedfsError(f"{served.name}: is not there any more")
        await self.images.cut_over.deactivate(found)

    async def move_source(self, served: ServedImage, place: str, *, force: bool = False) -> None:
        """See `Mounted`."""
        found = self.images.registry.by_name(served.name)
        if found is None:
            raise QedfsError(f"{served.name}: is not there any more")
        await self.images.moves.move(found, place, device=self.device, force=force)

    async def resize(self, served: ServedImage, size: int) -> None:
        """See `Mounted`."""
        found = self.images.registry.by_name(served.name)
        if found is None or found.image is None:
            raise QedfsError(f"{served.name}: is not served")
        async with found.cut_over:
            await grow(found.image, size)
        await KernelPages(self.mountpoint).show_size(found)

    async def populate(
        self, served: ServedImage, place: str, *, backing_format: str | None = None, force: bool = False
    ) -> None:
        """See `Mounted`."""
        if served.image is None or served.jobs is None:
            raise QedfsError(f"{served.name}: is not served")
        count = len(self.images.registry.images())
        sources, device = self.images.sources, self.device
        copy = await sources.copy_for(place, device=device, backing_format=backing_format, overlays=count)
        served.jobs.begin_populate(copy, force=force)

    def released(self) -> dict[str, str]:
        """See `Mounted`."""
        return self.images.released.overlays()

    async def release(self, served: ServedImage) -> bool:
        """See `Mounted`."""
        found = self.images.registry.by_name(served.name)
        if found is None:
            raise QedfsError(f"{served.name}: is not there any more")
        return await self.images.releases.release(found)

    async def snapshot(self, served: ServedImage, file: str) -> Snapshot:
        """See `Mounted`."""
        found = self.images.registry.by_name(served.name)
        if found is None:
            raise QedfsError(f"{served.name}: is not there any more")
        return await self.images.snapshots.take(found, file, mountpoint=self.mountpoint)

    async def take_back(self, name: str) -> bool:
        """See `Mounted`."""
        return await self.images.releases.undo(name)

    def quit(self, failure: QedfsError | None = None) -> None:
        """Begin to stop. `failure`: why the mount has failed; the first failure is the one that `serve` raises."""
        self.failure = self.failure or failure
        self.takeover.established.set()  # or a start would wait for a request that never comes
        self._quit.set()

    async def stopping(self) -> None:
        """Wait until `quit` is called."""
        await self._quit.wait()


async def serve(settings: Settings, ready: Callable[[Mounted], None], link: HolderLink = NO_HOLDER) -> None:
    """Mount, and serve until the file system is unmounted or a signal arrives.

    `ready` is called once requests are answered. With `until_streamed`, serving also ends when every overlay is
    complete and no image is open. `link`: to the holder, which may have a mount that is to be taken over.

    Raises:
        UsageError: the source or the mountpoint is not there or not usable.
        InUse: the mountpoint or the single overlay is busy.
        QedfsError: the single overlay cannot be served; with `until_streamed`, an overlay cannot complete; the
            connection to the kernel was cut; or the last flush of an overlay failed (NoSpace if the disk is full).
    """
    try:
        takeover = Takeover(link, link.turn())
        link.tell("alive")  # before anything that could hang, until `Takeover.beat` does
    except HolderGone:
        remove_dead(settings.mountpoint)
        raise
    if not takeover.is_taken:
        check_mountpoint(settings.mountpoint, settings.source)
    try:
        with serving_folder(settings.mountpoint) as home:
            await _serve(settings, ready, home, takeover)
    finally:
        if takeover.over:
            link.finish("over")
    if takeover.handing and not link.finish("handed"):
        exit_report.discard(settings.mountpoint)  # everything was closed
        remove_dead(settings.mountpoint)
        raise QedfsError(HOLDER_KILLED)


async def _serve(settings: Settings, ready: Callable[[Mounted], None], home: Path, takeover: Takeover) -> None:
    descriptors.raise_limit()
    oom.stay_killable()
    memory.set_up()
    scheduling.ask_for_short_slices()
    if not takeover.is_taken:
        exit_report.discard(settings.mountpoint)  # the report of an earlier mount, if nobody has read it
    link = takeover.link
    link.end_if_orphaned()
    notifier = Notifier(relay=link.tell if link else None)
    options = dataclasses.replace(settings.options, session_prefix=takeover.session_prefix())
    async with trio.open_nursery() as nursery:
        # Tasks of this nursery run until the overlays are closed.
        nursery.start_soon(notifier.watchdog)
        nursery.start_soon(takeover.beat)
        session = FuseSession(settings.mountpoint)
        pages, names = KernelPages(session.mountpoint), KernelNames(session.mountpoint)
        images = Images(
            settings.source,
            options,
            nursery,
            forget=_leave_name if link else forget_name,
            drop_pages=pages.drop,
            drop_name=names.drop,
            link=link,
            values=takeover.values,
        )
        try:
            await images.registry.scan()
            mount = Mount(images, session, takeover)
            # The holder passes signals on, and its user may have sent one to us as well.
            await nursery.start(stop_on_signal, mount.quit, signal.SIG_IGN if link else signal.SIG_DFL)
            nursery.start_soon(dump_on_signal, mount.fetches)
            await _serve_mounted(mount, settings, home / SOCKET_NAME, ready, notifier)
        finally:
            with trio.CancelScope(shield=True):
                images.note()
                losses = await images.close() or takeover.losses()  # ours are the earlier ones again, or more
                images.note_closed()
                if losses and not takeover.over:  # it hands over, or has crashed
                    link.set("lost", str(_summed_up(losses)))
                if takeover.over or not takeover.is_taken:
                    exit_report.discard(settings.mountpoint)
        nursery.cancel_scope.cancel()
    if losses and not takeover.handing:
        error = _summed_up(losses)
        exit_report.write(settings.mountpoint, error)
        raise error
    if mount.failure is not None:
        raise mount.failure.fresh()


def _summed_up(errors: list[QedfsError]) -> QedfsError:
    """One error that stands for all of them, since the user gets one line and one exit code."""
    if len(errors) == 1:
        return errors[0]
    return type(errors[0])(f"{errors[0]}; and {len(errors) - 1} more overlays, see the log")


async def _serve_mounted(
    mount: Mount, settings: Settings, socket: Path, ready: Callable[[Mounted], None], notifier: Notifier
) -> None:
    images, session = mount.images, mount.session
    takeover = mount.takeover
    takeover.begin(
        session,
        Operations(images.registry, images.folder),
        images.folder.source,
        allow_other=settings.allow_other,
        read_only=settings.options.read_only,
    )
    exit_report.assume_killed(settings.mountpoint)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_answer_kernel, mount)
            nursery.start_soon(_heed_holder, mount)
            nursery.start_soon(images.registry.watch)
            nursery.start_soon(memory.give_back_memory, images.sources.buffers)
            nursery.start_soon(
                release_abandoned_reads,
                images.registry.open_images,
                mount.mountpoint,
                lambda: session.is_mounted,
                lambda: session.device,
            )
            await nursery.start(serve_control, socket, mount)
            if settings.metrics is not None:
                await nursery.start(serve_metrics, settings.metrics, mount)
            await _tune(mount)
            for served in images.registry.images():
                if served.stale_pages:
                    nursery.start_soon(images.cut_over.refresh, served)
            ready(mount)
            takeover.serve()
            log.info("serving %s at %s", images.folder.source, mount.mountpoint)
            notifier.ready()
            nursery.start_soon(notifier.tell_status, mount.everything)
            if settings.until_streamed:
                nursery.start_soon(_quit_when_streamed, mount)
            await mount.stopping()
            if takeover.handing:
                await takeover.leave(session)
            else:
                notifier.stopping()
                _log_open_images(mount)
            nursery.cancel_scope.cancel()
    except BaseException:
        # Nobody has told this server to end: an error that nobody expected, here or in a task of ours elsewhere.
        if takeover.survives_crash:
            session.abandon()
            raise
        session.end()
        takeover.over = True
        raise
    session.end()
    takeover.over = not takeover.handing


def _leave_name(_: str) -> None:
    """Leave the name of a removed image in the kernel's cache, which asks again after ATTRIBUTE_SECONDS.

    The thread that drops it would wait for lookups which we have to answer: see `fuse_session.py`.
    """


async def _tune(mount: Mount) -> None:
    """Set the kernel's read-ahead once the mount answers."""
    if mount.takeover.link:
        # Nothing of ours may wait for the mount: see `fuse_session.py`.
        await mount.takeover.established.wait()
        tune_device(mount.device)
        return
    await trio.to_thread.run_sync(tune, mount.mountpoint, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1))


async def _heed_holder(mount: Mount) -> None:
    """Hear what the holder wants, and keep it informed."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_inform_holder, mount)
        failure = await mount.takeover.hear()
        nursery.cancel_scope.cancel()
    mount.quit(failure)


async def _inform_holder(mount: Mount) -> None:
    while mount.takeover.link:
        mount.images.note_total()
        mount.takeover.link.flush()
        await next_beat(INFORM_SECONDS)


async def _answer_kernel(mount: Mount) -> None:
    mount.quit(await mount.session.answer())


async def _quit_when_streamed(mount: Mount) -> None:
    mount.quit(await until_streamed(mount.images.registry))


def _log_open_images(mount: Mount) -> None:
    """Warn about images that are still open. A signal ends a mount even if it is in use, unlike `qedfs umount`."""
    names = [served.name for served in mount.everything() if served.opens] if mount.session.is_mounted else []
    if names:
        log.warning("%s: still open; its users get errors from now on", ", ".join(names))
