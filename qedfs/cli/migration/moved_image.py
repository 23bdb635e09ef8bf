"""The image that a moved disk becomes: its cut-over, the way back, and the wait until it is complete.

Owns the connection to the server of the mount, which may be on another host. Must not know who has the guest.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable

from qedfs.cli.served_images import STOPPED, Image, check_served, failure_of, fetch, stem
from qedfs.control.qmp.client import Client
from qedfs.errors import NotMounted, QedfsError, UsageError
from qedfs.source.url import Location, parse_location

# The guest stands still meanwhile. A mount needs less than 2 s, whatever its source does.
CUT_OVER_SECONDS = 2.5
WAY_BACK_SECONDS = 10.0
POLL_SECONDS = 0.5
STANDBY = "standby"  # the state of an image that keeps nothing of its source yet

Connect = Callable[[], Client]
Say = Callable[[str], None]


class MovedImage:
    """An image in standby. Its str() is its name."""

    def __init__(self, connect: Connect, wanted: str | None) -> None:
        """`wanted`: its name, or None for the only one. Raises UsageError unless it is in standby, over NBD."""
        self._connect = connect
        self._client = connect()
        try:
            found = _image_meant(self._client, wanted)
            check_served(found)
            self._name: str = found["name"]
            self.size: int = found["size"]
            if found["state"] != STANDBY:
                raise UsageError(f"{self}: is not in standby, but {found['state']}; see mount --standby")
            self.backing: Location = parse_location(found["backing"])
            if self.backing.kind != "nbd":
                raise UsageError(
                    f"{self}: its backing is {self.backing}, but a running machine's disk is served over NBD"
                )
        except BaseException:
            self.close()
            raise

    def __str__(self) -> str:
        return self._name

    def check_ready(self) -> None:
        """Raise what the cut-over would raise now."""
        self._client.execute("x-qedfs-ready", device=self._name)

    def cut_over(self) -> None:
        """From now on the image keeps what it reads, and takes writes. Raises what the mount says, or TimedOut."""
        self._client.deadline = time.monotonic() + CUT_OVER_SECONDS
        self._client.execute("blockdev-set-active", node_name=stem(self._name), active=True)
        self._client.deadline = math.inf

    def way_back(self) -> None:
        """Put it back into standby. Raises QedfsError if it stays active, as once a guest has written."""
        # The first connection may still wait for an answer to the cut-over.
        with contextlib.closing(self._connect()) as client:
            client.deadline = time.monotonic() + WAY_BACK_SECONDS
            client.execute("blockdev-set-active", node_name=stem(self._name), active=False)
            if (state := _image_meant(client, self._name)["state"]) != STANDBY:
                raise QedfsError(f"{self}: is {state}")

    def wait_complete(self, show: Callable[[list[Image]], None], say: Say) -> None:
        """Return when it is complete. The mount may be away for a while, as after a crash.

        Raises the error that has stopped its stream.
        """
        away = False
        while True:
            try:
                found = _image_meant(self._client, self._name)
            except NotMounted as exc:
                if not away:
                    say(f"{exc}; the disk is served on until it is mounted again, and complete")
                away = True
                time.sleep(POLL_SECONDS)
                self._reconnect()
                continue
            away = False
            show([found])
            if found["state"] == "complete":
                return
            if found["state"] in STOPPED:
                raise failure_of(found)
            self._client.event(POLL_SECONDS)

    def close(self) -> None:
        """End the connection."""
        self._client.close()

    def _reconnect(self) -> None:
        with contextlib.suppress(QedfsError):
            client = self._connect()
            self._client.close()
            self._client = client


def _image_meant(client: Client, name: str | None) -> Image:
    """The image that moves. Raises UsageError if it is unclear which one that is."""
    images = fetch(client, name, client.peer)
    if len(images) != 1:
        raise UsageError(f"{client.peer}: has {len(images)} images; say which one the disk becomes")
    return images[0]
