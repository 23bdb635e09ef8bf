"""What a command does while one server of a mount takes over from another: it waits for the next one.

Owns the way to tell a mount without a server from one that is between two, and what follows if the server ends before
it has answered. It may have carried the request out, or not. Requests that name a state, not a step, are sent to the
next server once more. Of all others, the user is told that nobody knows. If that server ends, too, it may be because of
the request, and a mount whose servers die again and again is taken away: so there is no third time. Must not know what
the requests mean beyond that.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, TypeVar

from qedfs.control.qmp.client import Client, Gone, NotServed
from qedfs.errors import QedfsError, TimedOut
from qedfs.host.runtime import is_held, mount_places

GIVE_UP_SECONDS = 60.0  # as long as the holder counts the crashes of servers (DEATH_SECONDS in `mount/holder.py`)
PATIENCE_SECONDS = 30.0  # most take less than one; a busy machine, or many uncommitted entries, need longer
LOOK_SECONDS = 0.05
C = TypeVar("C", bound=Client)

# Of these, a second one changes nothing, whether the first one was carried out or not.
REPEATABLE = frozenset(
    {
        *("x-qedfs-status", "x-qedfs-missing", "x-qedfs-next-missing", "x-qedfs-profile", "x-qedfs-ready"),
        "x-qedfs-dry-run",
        *("query-block-jobs", "query-jobs", "x-qedfs-rescan", "x-qedfs-step"),
        *(
            "x-qedfs-start",
            "x-qedfs-pause",
            "x-qedfs-resume",
            "x-qedfs-cancel",
            "x-qedfs-limit",
            "x-qedfs-limit-total",
            "x-qedfs-populate-cancel",
        ),
        *("x-qedfs-on-source-error", "x-qedfs-source-set", "x-qedfs-release"),
        "block_resize",  # to a size, not by one
    }
)


class Unanswered(QedfsError):
    """The server has ended before it answered a request. Nobody knows whether it has carried it out."""


class Patience:
    """How long a command asks servers of a mount that end, one after the other, before they have answered.

    The holder takes a mount away whose servers crash too often. They may also crash a little more slowly, for ever.
    """

    def __init__(self) -> None:
        self._since: float | None = None  # the first end that no answer has followed

    def answered(self) -> None:
        """Note that a server has done what it was asked for."""
        self._since = None

    def ended(self, mountpoint: str) -> None:
        """Note that a server has ended. Raises TimedOut if that has gone on for GIVE_UP_SECONDS."""
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        if now - self._since >= GIVE_UP_SECONDS:
            raise TimedOut(
                f"{mountpoint}: for {GIVE_UP_SECONDS:.0f} s its servers have ended, one after the other, before they"
                " had answered; the log of the mount says why"
            )


class LastingClient(Client):
    """A connection to the server of a mount, or to the next one, if that ends in the middle."""

    mountpoint = ""
    taken_over = False  # whether it is with another server now than at first

    def execute(self, name: str, /, **arguments: Any) -> Any:  # noqa: ANN401 - JSON
        """See `Client.execute`. Raises Unanswered if the server has ended, but not the mount."""
        repeated = False
        while True:
            try:
                return super().execute(name, **arguments)
            except Gone as exc:
                if not is_between_servers(self.mountpoint):
                    raise
                if repeated or name not in REPEATABLE:
                    raise Unanswered(
                        f"{self.mountpoint}: the server has ended before it answered, and another one serves the mount"
                        " on; whether this was done is not known: look at qedfs status before you repeat it"
                    ) from exc
                self.go_on_with(reach_server(self.mountpoint, deadline=self.deadline))
                repeated = self.taken_over = True


def lasting_client(mountpoint: str, *, deadline: float = math.inf) -> LastingClient:
    """Connect to whichever server the mount has from now on. Raises what `reach_server` raises."""
    client = _reached(mountpoint, deadline, LastingClient.connect)
    client.mountpoint = mountpoint
    return client


def is_between_servers(mountpoint: str) -> bool:
    """Whether a mount is there that somebody holds, although no server answers: another one is about to."""
    from qedfs.cli.mount_table import FILESYSTEM, mounted_type  # here, because most commands find a server

    return mounted_type(mountpoint) == FILESYSTEM and any(map(is_held, mount_places(mountpoint)))


def reach_server(mountpoint: str, *, deadline: float = math.inf) -> Client:
    """Connect to the server of a mount and negotiate; waits for the next server if there is none just now.

    Raises:
        NotMounted: there is none, and there will be none.
        TimedOut: it does not reply, or the next one takes too long.
        UsageError: the path cannot be a qedfs mount.
    """
    return _reached(mountpoint, deadline, Client.connect)


def _reached(mountpoint: str, deadline: float, connect: Callable[..., C]) -> C:
    """See `reach_server`. `connect`: that of the kind of client."""
    patience = min(deadline, time.monotonic() + PATIENCE_SECONDS)
    while True:
        try:
            return connect(mountpoint, deadline=deadline)
        except NotServed as exc:
            if not is_between_servers(mountpoint):
                from qedfs.cli.mount_table import not_served  # here: see `is_between_servers`

                raise not_served(mountpoint) from exc
            if time.monotonic() >= patience:
                raise TimedOut(f"{mountpoint}: another server takes the mount over, and does not answer yet") from exc
        time.sleep(LOOK_SECONDS)
