"""`qedfs upgrade`: lets a server of the installed version take a mount over.

Owns the wait until the next server answers. Must not know how one server follows another (`mount/holder.py`,
`mount/takeover.py`).
"""

from __future__ import annotations

import os
import time
from typing import Any

import click

from qedfs.cli.completion import mountpoints
from qedfs.cli.given_once import GivenOnce
from qedfs.cli.mount_table import FILESYSTEM, mounted_type
from qedfs.cli.option_types import DURATION, PLACE
from qedfs.cli.takeovers import lasting_client
from qedfs.control.qmp.client import Client
from qedfs.errors import NotMounted, TimedOut
from qedfs.units import format_seconds

LOOK_SECONDS = 0.02


@click.command(cls=GivenOnce, short_help="Let the installed version serve a mount.")
@click.argument("mountpoint", type=PLACE, shell_complete=mountpoints)
@click.option(
    "--timeout", type=DURATION, default="60s", show_default=True, metavar="TIME", help="How long to wait for that."
)
def upgrade(mountpoint: str, timeout: float) -> None:
    """Replace the server of MOUNTPOINT by one of the installed version.

    Files that are open stay open. Requests wait meanwhile, for less than a second as a rule; the old server ends only
    when the new one has been started. If that cannot be, because the new version has an error or does not know an
    option of the mount, the old one serves on.
    """
    mountpoint = os.path.abspath(mountpoint)
    try:
        pid, successor, status = _upgraded(mountpoint, time.monotonic() + timeout)
    except TimedOut as exc:
        raise TimedOut(f"{mountpoint}: no new server has answered within {format_seconds(timeout)}") from exc
    pause = status["last_restart"]["pause_seconds"]
    click.echo(f"{mountpoint}: server {successor} has taken over from {pid}; requests waited for {pause:.2f} s")


def _upgraded(mountpoint: str, deadline: float) -> tuple[int, int, dict[str, Any]]:
    """Have the server replaced. Returns the pid of the old one, the pid of the new one, and the status of that."""
    with lasting_client(mountpoint, deadline=deadline) as client:
        pid = client.server_pid
        before = client.execute("x-qedfs-status")["restarts"]
        client.execute("x-qedfs-upgrade")
    while True:
        try:
            with Client.connect(mountpoint, deadline=deadline) as client:
                status: dict[str, Any] = client.execute("x-qedfs-status")
                if status["restarts"] != before:
                    return pid, client.server_pid, status
        except NotMounted:  # the old server closes connections, and the new one listens a moment later
            if mounted_type(mountpoint) != FILESYSTEM:  # somebody has ended it
                raise
        if time.monotonic() > deadline:
            raise TimedOut(mountpoint)
        time.sleep(LOOK_SECONDS)
