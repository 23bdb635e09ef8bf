"""`qedfs defrag`: lays the data of a mounted overlay out in the order of its image."""

from __future__ import annotations

import os
import time
from typing import Any

import click

from qedfs.cli.completion import images, mountpoints
from qedfs.cli.given_once import GivenOnce
from qedfs.cli.option_types import PLACE, RATE
from qedfs.cli.served_images import Image, check_served, connect, fetch
from qedfs.cli.takeovers import lasting_client
from qedfs.cli.ui.output import print_json, remark
from qedfs.control.qmp.client import Client, Gone, error_of
from qedfs.errors import QedfsError, UsageError

KIND = "defrag"
POLL_SECONDS = 0.2
REMARK_SECONDS = 10.0


@click.command(cls=GivenOnce, short_help="Lay an overlay out in the order of its image.")
@click.argument("mountpoint", type=PLACE, shell_complete=mountpoints)
@click.argument("image", shell_complete=images)
@click.option("--limit", type=RATE, metavar="SIZE", help="At most SIZE bytes per second, 0 for no limit.")
@click.option("--no-wait", is_flag=True, help="Return as soon as it has begun.")
@click.option("--pause", "command", flag_value="pause", help="Pause the one that runs.")
@click.option("--resume", "command", flag_value="resume", help="Let it continue.")
@click.option("--cancel", "command", flag_value="cancel", help="End it. What is in order stays so.")
@click.option("--quiet", "-q", is_flag=True, help="Print no progress and no result, only errors.")
@click.option("--json", "as_json", is_flag=True, help="Print the image's status afterwards as JSON.")
def defrag(
    mountpoint: str,
    image: str,
    limit: int | None,
    no_wait: bool,
    command: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Lay the data of IMAGE's overlay out in the order of the image, while guests use it.

    After that, reading the image from start to end reads the overlay's file from start to end. The stream must have
    ended, or be off. Needs 128 MiB of free space. With --limit and a job that runs, its limit changes. Ctrl-C ends it,
    and what is in order stays so. If another server takes the mount over, it begins anew, but not with --no-wait.
    qedfs info shows in how many pieces an overlay is.
    """
    if command and (no_wait or limit is not None):
        raise UsageError(f"--{command} goes without --limit and --no-wait")
    with lasting_client(mountpoint) as client:
        found = fetch(client, image, mountpoint)[0]
        check_served(found)
        if command:
            client.execute(f"x-qedfs-{command}", device=found["name"], type=KIND)
        elif limit is not None and _runs(found):
            client.execute("x-qedfs-limit", device=found["name"], type=KIND, limit=limit)
        elif no_wait:
            _start(client, found["name"], limit)
        else:
            with connect(mountpoint) as one:  # the end of its server is the end of the job
                _run(one, found["name"], mountpoint, limit, quiet=quiet or as_json)
    with connect(mountpoint) as client:  # perhaps to another server
        found = fetch(client, image, mountpoint)[0]
    if as_json:
        print_json({"mountpoint": os.path.abspath(mountpoint), "images": [found]})
    elif not (quiet or command or no_wait or _runs(found)):
        click.echo(f"{found['name']}: in order")


def _start(client: Client, name: str, limit: int | None) -> None:
    client.execute("x-qedfs-start", device=name, type=KIND, limit=limit or 0)


def _run(client: Client, name: str, mountpoint: str, limit: int | None, *, quiet: bool) -> None:
    """Start it, and wait for its end. If another server takes the mount over, without the job, it begins anew."""
    try:
        _start(client, name, limit)
        _watch(client, name, mountpoint, quiet=quiet)
    except KeyboardInterrupt:
        client.execute("x-qedfs-cancel", device=name, type=KIND)
        raise
    except Gone:
        with connect(mountpoint) as other:
            if not quiet:
                remark(f"{name}: another server has taken the mount over; begins anew, what is in order stays so")
            _run(other, name, mountpoint, limit, quiet=quiet)


def _watch(client: Client, name: str, mountpoint: str, *, quiet: bool) -> None:
    """Wait until it has ended. Raises the error with which it has failed."""
    said = time.monotonic()
    while True:
        job = fetch(client, name, mountpoint)[0]["job"] or {"state": "off"}
        if job["state"] == "complete":
            return
        if job["state"] == "failed":
            raise error_of(job["exit_code"], f"{name}: {job['error']}")
        if job["state"] == "off":
            raise QedfsError(f"{name}: was cancelled by another command; what is in order stays so")
        if not quiet and time.monotonic() - said >= REMARK_SECONDS:
            said = time.monotonic()
            remark(f"{name}: {_words(job)}")
        time.sleep(POLL_SECONDS)


def _words(job: dict[str, Any]) -> str:
    percent = 100 * job["done"] // job["total"] if job["total"] else 100
    return f"{percent}%" + (f", {job['state']}: {job['reason']}" if job["reason"] else "")


def _runs(image: Image) -> bool:
    job = image["job"]
    return job is not None and job["type"] == KIND and job["state"] in ("running", "waiting", "paused")
