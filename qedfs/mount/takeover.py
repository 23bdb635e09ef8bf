"""How a mount passes from one server to the next, as the servers see it. See `holder.py` for the third party.

Owns the events of one server's life under a holder: it gives the holder what the next server will need, takes a mount
over, hears when to hand it over, and says how it has ended. Must not know what is served.

What a dead server had read and not answered, the kernel sends again (Linux 6.9). Each request may be done twice, since
one that is not answered is not over: no bytes that were written later, by somebody who had waited for it, can be in its
place. A read, an fsync and a lookup change nothing. A write puts the same bytes there again, a discard the same zeros.
Two requests for the same bytes that were in flight at the same time have no order, with one server or with two.
`inode_numbers.py` says what a repeated open() and release() do.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import secrets
import time
from collections.abc import Mapping

import trio

from qedfs.errors import QedfsError
from qedfs.mount.fuse_init import can_resend, is_init
from qedfs.mount.fuse_session import FileSystem, FuseSession
from qedfs.mount.held import ALIVE_SECONDS, HolderLink, Taken
from qedfs.mount.mountpoint import MountInfo
from qedfs.mount.receive_buffers import touch_receive_buffers

log = logging.getLogger(__name__)

HOLDER_KILLED = "the holder of the mount was killed; the mount is taken away"
REPLY_SECONDS = 0.5  # for the answer to whoever asked for an upgrade, before the server hands over


@dataclasses.dataclass(frozen=True, slots=True)
class Restart:
    """The last change of servers."""

    reason: str  # how the server before this one has ended
    count: int  # how many servers have taken this mount over
    pause_seconds: float  # how long the mount has answered nothing
    kinds: Mapping[str, int]  # the count, by what had ended the earlier servers


class Takeover:
    """One server's part. `taken`: the mount that it takes over, None if it makes one."""

    def __init__(self, link: HolderLink, taken: Taken | None) -> None:
        self.link = link
        self.established = trio.Event()  # the kernel's first request was answered
        self.restart: Restart | None = None
        self.handing = False  # to the next server
        self.over = False  # the mount has ended in order
        self.serving = False  # requests are answered, and the holder knows it
        self._taken = taken
        self._values: Mapping[str, str] = taken.values if taken is not None else {}
        self._request = b""
        self._heir: trio.Event | None = None  # set when the next server is ready, or has failed
        self._failure = ""

    @property
    def is_taken(self) -> bool:
        """Whether the mount was made by an earlier server."""
        return self._taken is not None

    @property
    def values(self) -> Mapping[str, str]:
        """What earlier servers have told."""
        return self._values

    def session_prefix(self) -> str:
        """The beginning of the ids of all sessions of this mount, whichever server begins them; "" without a holder."""
        if not self.link:
            return ""
        prefix = self._values.get("token") or secrets.token_hex(8)
        self.link.set("token", prefix)
        return prefix

    def losses(self) -> list[QedfsError]:
        """What earlier servers could not make durable when they closed the overlays."""
        return [QedfsError(self._values["lost"])] if "lost" in self._values else []

    def begin(
        self, session: FuseSession, operations: FileSystem, source: str, *, allow_other: bool, read_only: bool
    ) -> None:
        """Mount, or take the mount over. Raises QedfsError."""
        if self.link:
            touch_receive_buffers()
        if self._taken is None:
            done = functools.partial(self._keep, session) if self.link else None
            session.mount(operations, source, allow_other=allow_other, read_only=read_only, done=done)
            if session.mounted is not None:
                self.link.set("device", session.mounted.device)
                self.link.set("kind", session.mounted.kind)
                self.link.set("source", session.mounted.source.hex())
            return
        mounted = MountInfo(self._values["device"], self._values["kind"], bytes.fromhex(self._values["source"]))
        taken = self._taken

        def taken_over(_: int, request: bytes) -> None:
            self._request = request
            session.breaks_off = can_resend(request)
            self._note(Restart(taken.reason, taken.restarts, time.monotonic() - taken.since, taken.kinds))

        session.take_over(operations, self._taken.fd, mounted, bytes.fromhex(self._values["init"]), taken_over)

    def _keep(self, session: FuseSession, fd: int, request: bytes) -> None:
        """The mount answers: from now on it may outlive this server."""
        self._request = request
        if is_init(request):
            self.link.set("init", request.hex())
            if can_resend(request):
                self.link.set("resend", "yes")
                session.breaks_off = True
            self.link.keep(fd)
        else:
            log.warning("libfuse has mounted in a way that no other server can continue: a crash ends this mount")
        self.established.set()

    def _note(self, restart: Restart) -> None:
        self.restart = restart
        text = "took the mount over after %s; it has answered nothing for %.2f s"
        log.warning(text, restart.reason, restart.pause_seconds)
        self.established.set()

    async def beat(self) -> None:
        """Tell the holder that the event loop turns, until requests are answered. A server that hangs is replaced."""
        while self.link and not self.serving:
            self.link.tell("alive")
            await trio.sleep(ALIVE_SECONDS)

    def serve(self) -> None:
        """Tell the holder that requests are answered. From now on a crash costs the mount nothing."""
        self.serving = True
        self.link.tell("serving")

    @property
    def without_upgrade(self) -> str:
        """Why no other server can take the mount over; "" if one can."""
        if not self.link:
            return "the mount has no holder (--no-restart)"
        if not self._request:
            return "the kernel has sent nothing yet"
        return "" if is_init(self._request) else "libfuse has mounted in a way that no other server can continue"

    @property
    def without_restart(self) -> str:
        """Why a crash of the server ends the mount; "" if another one takes over."""
        if self.without_upgrade or can_resend(self._request):
            return self.without_upgrade
        return "this kernel does not repeat requests (Linux 6.9 does)"

    @property
    def survives_crash(self) -> bool:
        """Whether the holder starts another server if this one ends without a word."""
        return (self.serving or self.is_taken) and not self.without_restart

    # Handing over.

    async def upgrade(self, mountpoint: str) -> None:
        """Ask for the next server, and wait until it is ready. Then `hand_over` follows, when this is answered.

        Raises:
            QedfsError: the mount has no holder, or the next server could not start; this one serves on.
        """
        if self.without_upgrade:
            raise QedfsError(f"{mountpoint}: cannot be upgraded: {self.without_upgrade}; unmount it and mount it again")
        if self._heir is None:  # otherwise somebody else has asked, and waits for the same server
            self._heir, self._failure = trio.Event(), ""
            self.link.tell("upgrade")
        await self._heir.wait()
        if self._failure:
            raise QedfsError(f"{mountpoint}: the new server could not start, so the old one serves on: {self._failure}")

    async def hear(self) -> QedfsError | None:
        """Wait until this server shall end: to hand over, or with this error because the holder has gone."""
        while said := await self.link.heard():
            verb, _, rest = said.partition(" ")
            heir, self._heir = self._heir, None
            if verb == "failed":
                log.error("the new server could not start: %s", rest)
                self._failure = rest
            if heir is not None:
                heir.set()
            if verb == "hand":
                if heir is not None:
                    await trio.sleep(REPLY_SECONDS)
                self.handing = True
                return None
        return QedfsError(HOLDER_KILLED)

    async def leave(self, session: FuseSession) -> None:
        """Answer what is in flight, as far as the kernel cannot repeat it, and nothing else."""
        self.link.set("paused", repr(time.monotonic()))
        await session.leave(wait=not can_resend(self._request))
