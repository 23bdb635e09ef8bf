"""`qedfs upgrade`: lets a server of the installed version take a mount over."""

from __future__ import annotations

import os
import time

import click

from qedfs.cli.completion import mountpoints
from qedfs.cli.given_once import GivenOnce
from qedfs.cli.option_types import DURATION, PLACE
from qedfs.cli.served_images import connect
from qedfs.control.qmp.client import Client
from qedfs.errors import NotMounted, TimedOut

LOOK_SECONDS = 0.02


@click.command(cls=GivenOnce, short_help="Let the installed version serve a mount.")
@click.argument("mountpoint", type=PLACE, shell_complete=mountpoints)
@click.option(
    "--timeout", type=DURATION, default="60s", show_default=True, metavar="TIME", help="How long to wait for that."
)
def upgrade(mountpoint: str, timeout: float) -> None:
    """Replace the server of MOUNTPOINT, which was mounted with --restart, by one of the installed version.

    Files that are open stay open. Requests wait meanwhile, for less than a second as a rule; the old server ends only
    when the new one has been started. If that cannot be, because the new version has an error or does not know an
    option of the mount, the old one serves on.
    """
    mountpoint = os.path.abspath(mountpoint)
    deadline = time.monotonic() + timeout
    with connect(mountpoint, deadline=deadline) as client:
        pid = client.server_pid
        before = client.execute("x-qedfs-status")["restarts"]
        client.execute("x-qedfs-upgrade")
    while True:
        try:
            with Client.connect(mountpoint, deadline=deadline) as client:
                status = client.execute("x-qedfs-status")
                successor = client.server_pid
                if status["restarts"] != before:
                    break
        except NotMounted:  # the old server closes connections, and the new one listens a moment later
            pass
        if time.monotonic() > deadline:
            raise TimedOut(f"{mountpoint}: no new server answers yet")
        time.sleep(LOOK_SECONDS)
    pause = status["last_restart"]["pause_seconds"]
    click.echo(f"{mountpoint}: server {successor} has taken over from {pid}; requests waited for {pause:.2f} s")
