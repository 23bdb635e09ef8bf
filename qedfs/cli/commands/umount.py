"""`qedfs umount`: unmounts, and returns when the overlays are free."""

from __future__ import annotations

import click

from qedfs.cli.completion import mountpoints
from qedfs.cli.given_once import GivenOnce
from qedfs.cli.option_types import DURATION, PLACE
from qedfs.cli.plain.umount import umount as run


@click.command(cls=GivenOnce, short_help="Unmount and wait until the overlays are free.")
@click.argument("mountpoint", type=PLACE, shell_complete=mountpoints)
@click.option(
    "--wait",
    "wait_seconds",
    type=DURATION,
    default=0.0,
    metavar="TIME",
    help="If it is in use, say by whom, and wait up to TIME for it to become free.",
)
@click.option("--if-mounted", is_flag=True, help="Succeed if nothing is mounted there.")
def umount(mountpoint: str, wait_seconds: float, if_mounted: bool) -> None:
    """Unmount MOUNTPOINT.

    Returns when the server has flushed and closed every overlay, so that QEMU or another mount may open them. If the
    last flush of an overlay has failed, fails with the reason, even if another program unmounted it. If something in
    the mount is in use, fails with exit code 8 and leaves it mounted. Removes a mount whose server has died. A copy of
    the mount in another mount namespace, such as a container's, ends too, unless an image is open there.
    """
    run(mountpoint, wait_seconds=wait_seconds, if_mounted=if_mounted)
