"""Releases images: a complete one leaves the mount once nobody has it open, so that others can open its overlay.

Owns the orders to release, and the order of the steps. Must not know commands, nor what the kernel does with a name.

0. Nobody has the image open any more, and no job is at work. One that is paused is cancelled then: it would wait for
   its user as long as the image is there, and what it has done stays done. One that runs comes to its end.
1. The image is flushed while it is still served. If that fails, the order ends with its error, and nothing has changed.
2. The overlay is marked as left alone, so that no scan of the folder opens it again (`released.py`).
3. The image leaves the list, in the same step: an open() from here on gets ESTALE, after which the kernel looks the
   name up again and does not find it.
4. The overlay is closed: a last flush, the note of the clean end in the record, the journal is removed, the locks go.
5. The next server is told. Until then it would have the order, and do all this again, for it finds the image served.
6. The kernel drops the name.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

from qedfs.errors import QedfsError, UsageError
from qedfs.image.image import Image
from qedfs.mount.registry import Registry
from qedfs.mount.released import Released
from qedfs.mount.served import Served
from qedfs.units import format_size

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.5  # between two looks whether a job has ended, for which nobody wakes us
NAME_SECONDS = 1.0  # for the kernel to drop a name. It would do so by itself after ATTRIBUTE_SECONDS.

DropName = Callable[[str], Awaitable[None]]


class Order:
    """The order to release one image. `ended` is set when that is done, or has failed with `error`."""

    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self.tried = trio.Event()  # the image was found in use, or the order has ended
        self.ended = trio.Event()
        self.error: QedfsError | None = None

    def end(self, error: QedfsError | None) -> None:
        """No step follows."""
        self.error = error
        self.ended.set()
        self.tried.set()


class Releases:
    """The releases of one mount."""

    def __init__(
        self, registry: Registry, released: Released, nursery: trio.Nursery, drop_name: DropName, *, single: bool
    ) -> None:
        """`nursery` runs the orders. `drop_name`: lets the kernel drop a name. `single`: one overlay is mounted."""
        self._registry = registry
        self._released = released
        self._nursery = nursery
        self._drop_name = drop_name
        self._single = single
        self._orders: dict[Served, Order] = {}
        registry.added = self._restore

    async def release(self, served: Served) -> bool:
        """Release an image as soon as nobody has it open. Returns whether that is done; otherwise the order stays.

        Raises:
            QedfsError: the image is not complete, or the overlay cannot be flushed. It is served on.
            UsageError: it is the only overlay of the mount.
        """
        order = self._orders.get(served)
        if order is None:
            _check(served, single=self._single)
            self._released.note_order(served)
            order = self._begin(served)
        await order.tried.wait()
        if order.error is not None:
            raise order.error.fresh()
        return order.ended.is_set()

    async def undo(self, name: str) -> bool:
        """Serve an image on, or again, that was to be released, or was. Returns whether there was such an image.

        Raises the QedfsError because of which its overlay cannot be served, such as InUse.
        """
        for served, order in list(self._orders.items()):
            if served.name == name:
                order.scope.cancel()
                await order.ended.wait()
                self._released.take_back(served)
                if not served.removed:
                    return True
        if not self._released.forget(name):
            return False
        await self._registry.rescan()
        again = self._registry.listed(name)
        if again is not None and again.error is not None:
            raise again.error.fresh()
        return True

    async def stop(self) -> None:
        """Carry out no further order, and wait for those that are under way. The next server has the others."""
        for order in list(self._orders.values()):
            order.scope.cancel()
            await order.ended.wait()

    def _restore(self, served: Served) -> None:
        """An image was opened, which an earlier server may have been told to release."""
        if self._released.is_ordered(served):
            self._begin(served)

    def _begin(self, served: Served) -> Order:
        order = self._orders[served] = Order()
        served.releasing = True
        self._nursery.start_soon(self._carry_out, served, order)
        return order

    async def _carry_out(self, served: Served, order: Order) -> None:
        error: QedfsError | None = None
        try:
            with order.scope:
                await self._flushed_and_unused(served, order)
                with trio.CancelScope(shield=True):
                    await self._let_go(served)
            if order.scope.cancelled_caught:
                error = QedfsError(f"{served.name}: is not released: the order was taken back")
        except QedfsError as exc:
            error = exc
            log.error("%s: is not released: %s", served.name, exc)
            self._released.take_back(served)
        finally:
            served.releasing = False
            del self._orders[served]
            order.end(error)

    async def _flushed_and_unused(self, served: Served, order: Order) -> None:
        """Steps 0 and 1. When this returns, nobody has had the image open since the flush began."""
        while True:
            while served.opens or (served.jobs is not None and served.jobs.at_work is not None):
                order.tried.set()
                if not served.opens:
                    _end_paused(served)
                served.unused = trio.Event()
                with trio.move_on_after(LOOK_SECONDS):
                    await served.unused.wait()
            image = _check(served, single=self._single)
            before = served.releases
            await image.flush()
            if not (served.opens or served.removed) and served.releases == before:
                return

    async def _let_go(self, served: Served) -> None:
        """Steps 2 to 6."""
        self._released.add(served)
        error = await self._registry.let_go(served)
        self._released.note_done(served)
        with trio.move_on_after(NAME_SECONDS):
            await self._drop_name(served.name)
        log.info("%s: is released; its overlay %s is free", served.name, served.path)
        if error is not None:
            raise error


def _end_paused(served: Served) -> None:
    """Cancel a job that is paused."""
    job = None if served.jobs is None else served.jobs.at_work
    if job is not None and job.paused:
        log.info("%s: its %s is paused, and ends, because the image is released", served.name, job.kind)
        job.cancel()


def _check(served: Served, *, single: bool) -> Image:
    """The image, if it may be released. Raises QedfsError."""
    image = served.image
    if single:
        raise UsageError(f"{served.name}: is the only image of this mount; qedfs umount gives its overlay back")
    if image is None or served.removed:
        raise QedfsError(f"{served.name}: is not served")
    if not image.complete:
        left = "it is not complete"
        if image.counted:
            left = f"{format_size(image.size - image.populated)} are missing"
        raise QedfsError(f"{served.name}: {left}, so only a mount shows all of it; qedfs wait says when it is complete")
    if (failure := image.overlay.damage or image.overlay.failure) is not None:
        raise failure.fresh()
    return image
