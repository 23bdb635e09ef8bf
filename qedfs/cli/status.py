"""`qedfs status`: what each image of a mount is doing."""

from __future__ import annotations

import time
from typing import Any

import click
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from qedfs.cli.images import connect
from qedfs.cli.output import console, print_json, print_json_line
from qedfs.control.client import Client, Gone
from qedfs.units import format_seconds, format_size

WATCH_SECONDS = 1.0


@click.command(short_help="Show what a mount is doing.")
@click.argument("mountpoint", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print JSON; with --watch, a line of it each second.")
@click.option("--watch", is_flag=True, help="Go on until the mount ends or Ctrl-C.")
def status(mountpoint: str, as_json: bool, watch: bool) -> None:
    """Show the images of the mount at MOUNTPOINT: state, how much is local, pace and remaining time."""
    with connect(mountpoint) as client:
        if watch:
            _watch(client, as_json=as_json)
            return
        found = client.execute("x-qedfs-status")
    if as_json:
        print_json(found)
    else:
        console().print(picture(found))


def _watch(client: Client, *, as_json: bool) -> None:
    screen = console()
    try:
        if as_json or not screen.is_terminal:
            while True:
                found = client.execute("x-qedfs-status")
                if as_json:
                    print_json_line(found)
                else:
                    screen.print(picture(found))
                time.sleep(WATCH_SECONDS)
        with Live(console=screen, auto_refresh=False) as live:
            while True:
                live.update(picture(client.execute("x-qedfs-status")), refresh=True)
                time.sleep(WATCH_SECONDS)
    except Gone:
        return


def picture(found: dict[str, Any]) -> RenderableType:
    """The status as a table, with a line below it for each trouble."""
    table = Table(box=None, pad_edge=False, expand=False)
    table.add_column("image", overflow="fold")
    table.add_column("state", no_wrap=True)
    table.add_column("local", justify="right", no_wrap=True)
    table.add_column("of", justify="right", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("pace", justify="right", no_wrap=True)
    table.add_column("left", justify="right", no_wrap=True)
    for image in found["images"]:
        table.add_row(*_cells(image))
    troubles = [Text(f"{image['name']}: {text}") for image in found["images"] if (text := _trouble(image))]
    return Group(table, *troubles) if found["images"] else Text(f"{found['mountpoint']}: no overlays there")


def _cells(image: dict[str, Any]) -> tuple[str, ...]:
    total, populated = image["total"], image["populated"]
    if not total:
        return (image["name"], image["state"], "", "", "", "", "")
    # Rounded down: 100% is said only when it is true.
    percent = f"{100 * populated // total}%"
    pace = f"{format_size(image['rate'])}/s" if image["rate"] and image["state"] == "running" else ""
    eta = image["eta_seconds"]
    left = format_seconds(eta) if eta else ""
    return (image["name"], image["state"], format_size(populated), format_size(total), percent, pace, left)


def _trouble(image: dict[str, Any]) -> str | None:
    found: str | None = image["error"] or image["reason"]
    return found
