"""Serves one mount from start to stop: the nursery, the readiness, the order of stopping.

Owns the life of everything else. Order of starting: overlays are opened, then the file system is mounted, then the
control socket listens, then `ready` is called. Order of stopping: the file system goes first, so that no request comes
any more; then each overlay is flushed and closed; then the connections are dropped.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import trio

from qedfs.control.monitoring.metrics_server import Address, serve_metrics
from qedfs.control.port import Mounted
from qedfs.control.qmp.server import serve_control
from qedfs.errors import QedfsError
from qedfs.fetch.queue import FetchQueue
from qedfs.host import descriptors
from qedfs.host.runtime import SOCKET_NAME, serving_folder
from qedfs.mount import exit_report, memory
from qedfs.mount.abandoned_reads import release_abandoned_reads
from qedfs.mount.fuse import Operations, forget_name
from qedfs.mount.fuse_session import FuseSession
from qedfs.mount.images import Images
from qedfs.mount.kernel_tuning import tune
from qedfs.mount.mountpoint import check_mountpoint
from qedfs.mount.notify import Notifier
from qedfs.mount.options import Options
from qedfs.mount.served import Served
from qedfs.mount.signals import dump_on_signal, stop_on_signal
from qedfs.mount.until_streamed import until_streamed

log = logging.getLogger(__name__)


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

    def __init__(self, images: Images, session: FuseSession) -> None:
        self.images = images
        self.session = session
        self.failure: QedfsError | None = None  # why it does not end well, by the overlays apart
        self._quit = trio.Event()

    @property
    def mountpoint(self) -> str:
        """Where, as an absolute path."""
        return self.session.mountpoint

    @property
    def device(self) -> str:
        """Which file system this is, in the kernel's tables of mounts; "" if they cannot be read."""
        return self.session.device

    def everything(self) -> list[Served]:
        """All overlays that were found."""
        return self.images.registry.everything()

    def fetches(self) -> list[FetchQueue]:
        """The fetch queues in use."""
        return self.images.sources.fetches()

    async def rescan(self) -> None:
        """Look into the folder again."""
        await self.images.registry.look()

    def quit(self, failure: QedfsError | None = None) -> None:
        """Begin to stop. `failure`: why it does not end well; the first one is what is reported."""
        self.failure = self.failure or failure
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
    check_mountpoint(settings.mountpoint, settings.source)
    with serving_folder(settings.mountpoint) as home:
        await _serve(settings, ready, home)


async def _serve(settings: Settings, ready: Callable[[Mounted], None], home: Path) -> None:
    descriptors.raise_limit()
    memory.set_up()
    exit_report.discard(settings.mountpoint)  # that of an earlier mount, which nobody has asked for
    notifier = Notifier()
    async with trio.open_nursery() as nursery:
        # What runs here also runs while the overlays are being closed.
        nursery.start_soon(notifier.watchdog)
        images = Images(settings.source, settings.options, nursery, forget=forget_name)
        try:
            await images.registry.scan()
            mount = Mount(images, FuseSession(settings.mountpoint))
            await nursery.start(stop_on_signal, mount.quit)
            nursery.start_soon(dump_on_signal, mount.fetches)
            await _serve_mounted(mount, settings, home / SOCKET_NAME, ready, notifier)
        finally:
            with trio.CancelScope(shield=True):
                losses = await images.close()
                exit_report.discard(settings.mountpoint)
        nursery.cancel_scope.cancel()
    if losses:
        error = _summed_up(losses)
        exit_report.write(settings.mountpoint, error)
        raise error
    if mount.failure is not None:
        raise mount.failure.fresh()


def _summed_up(errors: list[QedfsError]) -> QedfsError:
    """One error for all: whoever ends a mount gets one line and one exit code."""
    if len(errors) == 1:
        return errors[0]
    return type(errors[0])(f"{errors[0]}; and {len(errors) - 1} more overlays, which the log names")


async def _serve_mounted(
    mount: Mount, settings: Settings, socket: Path, ready: Callable[[Mounted], None], notifier: Notifier
) -> None:
    images, session = mount.images, mount.session
    session.mount(
        Operations(images.registry, images.folder),
        images.folder.source,
        allow_other=settings.allow_other,
        read_only=settings.options.read_only,
    )
    exit_report.assume_killed(settings.mountpoint)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_answer_kernel, mount)
            nursery.start_soon(images.registry.watch)
            nursery.start_soon(memory.give_back_memory, images.sources.buffers)
            nursery.start_soon(
                release_abandoned_reads, images.registry.images, mount.mountpoint, lambda: session.stands
            )
            await nursery.start(serve_control, socket, mount)
            if settings.metrics is not None:
                await nursery.start(serve_metrics, settings.metrics, mount)
            await trio.to_thread.run_sync(
                tune, mount.mountpoint, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1)
            )
            log.info("serving %s at %s", images.folder.source, mount.mountpoint)
            ready(mount)
            notifier.ready()
            nursery.start_soon(notifier.tell_status, mount.everything)
            if settings.until_streamed:
                nursery.start_soon(_quit_when_streamed, mount)
            await mount.stopping()
            notifier.stopping()
            _log_open_images(mount)
            nursery.cancel_scope.cancel()
    finally:
        session.end()


async def _answer_kernel(mount: Mount) -> None:
    mount.quit(await mount.session.answer())


async def _quit_when_streamed(mount: Mount) -> None:
    mount.quit(await until_streamed(mount.images.registry))


def _log_open_images(mount: Mount) -> None:
    """Log which images are taken from somebody: a signal ends a mount that is in use, where `qedfs umount` refuses."""
    names = [served.name for served in mount.everything() if served.opens] if mount.session.stands else []
    if names:
        log.warning("%s: still open; whoever has it open gets errors from now on", ", ".join(names))
