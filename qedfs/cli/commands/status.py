"""`qedfs status`: what each image of a mount is doing."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from qedfs.cli.completion import mountpoints
from qedfs.cli.found_mounts import mount_meant
from qedfs.cli.option_types import PLACE
from qedfs.cli.served_images import connect
from qedfs.cli.ui.output import console, print_json, print_json_line, terminal_width
from qedfs.cli.ui.status_lines import fitted_lines, status_lines
from qedfs.control.qmp.client import Client, Gone

if TYPE_CHECKING:
    from rich.console import Console

WATCH_SECONDS = 1.0
ANSWER_SECONDS = 10.0  # the server answers from memory


@click.command(short_help="Show what a mount is doing.")
@click.argument("mountpoint", type=PLACE, required=False, shell_complete=mountpoints)
@click.option("--json", "as_json", is_flag=True, help="Print JSON; with --watch, a line of it each second.")
@click.option("--watch", is_flag=True, help="Keep showing it until the mount ends or Ctrl-C.")
def status(mountpoint: str | None, as_json: bool, watch: bool) -> None:
    """Show the images of the mount at MOUNTPOINT: state, how much is local, pace and remaining time.

    MOUNTPOINT may be omitted if this user has a single mount (qedfs list).

    --watch shows as many images as the terminal has lines for; complete ones are left out first.
    """
    with connect(mount_meant(mountpoint), deadline=time.monotonic() + ANSWER_SECONDS) as client:
        if watch:
            _watch(client, as_json=as_json)
            return
        found = _ask(client)
    if as_json:
        print_json(found)
        return
    click.echo("\n".join(status_lines(found, terminal_width())))


def _ask(client: Client) -> dict[str, Any]:
    client.deadline = time.monotonic() + ANSWER_SECONDS
    found: dict[str, Any] = client.execute("x-qedfs-status")
    return found


def _watch(client: Client, *, as_json: bool) -> None:
    screen = console()
    try:
        if screen.is_terminal and not as_json:
            _watch_on(screen, client)
        else:
            _watch_in_lines(client, as_json=as_json)
    except Gone:
        return


def _watch_on(terminal: Console, client: Client) -> None:
    """Draw until the mount ends."""
    # Imported here because loading rich is slow, and a status without --watch is printed without it.
    from rich.text import Text

    from qedfs.cli.ui.screen import Screen

    with Screen(terminal, transient=False) as screen:
        while True:
            found = _ask(client)
            screen.show([Text(line) for line in fitted_lines(found, screen.width, screen.height)])
            time.sleep(WATCH_SECONDS)


def _watch_in_lines(client: Client, *, as_json: bool) -> None:
    """Print until the mount ends."""
    while True:
        found = _ask(client)
        if as_json:
            print_json_line(found)
        else:
            click.echo("\n".join([*status_lines(found), ""]))
        time.sleep(WATCH_SECONDS)
