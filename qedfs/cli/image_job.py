"""Starts a job of a mounted image beside its stream, waits for its end, and controls it: `qedfs defrag`, `commit`.

Owns what these commands have in common. Must not know what a job does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from typing import Any

import click

from qedfs.cli.served_images import Image, check_served, connect, fetch
from qedfs.cli.takeovers import GIVE_UP_SECONDS, LastingClient, Patience, lasting_client
from qedfs.cli.ui.output import print_json, remark
from qedfs.control.qmp.client import Client, Gone, error_of
from qedfs.errors import QedfsError, UsageError

POLL_SECONDS = 0.2
REMARK_SECONDS = 10.0
CANCEL_SECONDS = 2.0  # how long to wait for a job to end; most end at once


@dataclasses.dataclass(frozen=True, slots=True)
class JobOrder:
    """What the user wants. `stays`: what a job that ends early leaves, for messages. `ended`: said at its end."""

    mountpoint: str
    image: str
    kind: str
    stays: str
    ended: str
    limit: int | None = None
    command: str | None = None  # for the job that runs: pause, resume or cancel
    no_wait: bool = False
    quiet: bool = False
    as_json: bool = False
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)  # more of `x-qedfs-start`

    def carry_out(self) -> None:
        """Do it. Raises the error of the job, or a QedfsError."""
        if self.command and (self.no_wait or self.limit is not None):
            raise UsageError(f"--{self.command} goes without --limit and --no-wait")
        with lasting_client(self.mountpoint) as client:
            found = fetch(client, self.image, self.mountpoint)[0]
            check_served(found)
            if self.command:
                self._control(client, found["name"])
            elif self.limit is not None and is_running(found, self.kind):
                client.execute("x-qedfs-limit", device=found["name"], type=self.kind, limit=self.limit)
            elif self.no_wait:
                self._start(client, found["name"])
            else:
                with connect(self.mountpoint) as one:  # not lasting: the job ends with its server
                    self.run(one, found["name"])
        with connect(self.mountpoint) as client:  # perhaps to another server
            found = fetch(client, self.image, self.mountpoint)[0]
        if self.as_json:
            print_json({"mountpoint": os.path.abspath(self.mountpoint), "images": [found]})
        elif not (self.quiet or self.command or self.no_wait or is_running(found, self.kind)):
            click.echo(f"{found['name']}: {self.ended}")

    def _start(self, client: Client, name: str) -> None:
        client.execute("x-qedfs-start", device=name, type=self.kind, limit=self.limit or 0, **self.arguments)

    def _control(self, client: LastingClient, name: str) -> None:
        """Carry out `command`."""
        assert self.command is not None  # noqa: S101 - for the type checker
        try:
            client.execute(f"x-qedfs-{self.command}", device=name, type=self.kind)
        except QedfsError as exc:
            if not client.taken_over or is_running(fetch(client, name, self.mountpoint)[0], self.kind):
                raise
            if self.command != "cancel":
                raise QedfsError(
                    f"{name}: another server has taken the mount over, and the {self.kind} has ended with its server;"
                    f" {self.stays}"
                ) from exc
        if self.command == "cancel":
            self._cancelled(client, name)

    def _cancelled(self, client: Client, name: str) -> None:
        """Wait a moment until it has ended. If it cannot, say what it waits for."""
        until = time.monotonic() + CANCEL_SECONDS
        while is_running(found := fetch(client, name, self.mountpoint)[0], self.kind):
            if time.monotonic() >= until:
                reason = (found["job"] or {})["reason"] or "its last request to a disk has not been answered yet"
                remark(f"{name}: the {self.kind} ends later: {reason}")
                return
            time.sleep(POLL_SECONDS)

    def run(self, client: Client, name: str) -> None:
        """Start it, and wait for its end. If another server takes the mount over, without the job, it begins anew.

        Raises TimedOut if it has not got any further, although one server after the other has tried.
        """
        patience = Patience()
        with contextlib.ExitStack() as others:
            while True:
                try:
                    self._start(client, name)
                    self._watch(client, name, patience)
                    return
                except KeyboardInterrupt:
                    client.execute("x-qedfs-cancel", device=name, type=self.kind)
                    self._cancelled(client, name)
                    raise
                except Gone:
                    patience.ended(self.mountpoint)
                client = others.enter_context(connect(self.mountpoint))
                if not (self.quiet or self.as_json):
                    remark(f"{name}: another server has taken the mount over; begins anew, {self.stays}")

    def _watch(self, client: Client, name: str, patience: Patience) -> None:
        """Wait until it has ended. Raises the error with which it has failed."""
        said = served_since = time.monotonic()
        begun = None
        while True:
            job = fetch(client, name, self.mountpoint)[0]["job"] or {"state": "off"}
            if job["state"] == "complete":
                return
            begun = job["done"] if begun is None else begun
            # A job that is paused, or waits, gets no further, although its server is well.
            if job["done"] > begun or time.monotonic() - served_since >= GIVE_UP_SECONDS:
                patience.answered()
            if job["state"] in ("failed", "source-changed"):
                raise error_of(job["exit_code"], f"{name}: {job['error']}")
            if job["state"] == "off":
                raise QedfsError(f"{name}: was cancelled by another command; {self.stays}")
            if not (self.quiet or self.as_json) and time.monotonic() - said >= REMARK_SECONDS:
                said = time.monotonic()
                remark(f"{name}: {progress_words(job)}")
            time.sleep(POLL_SECONDS)


def progress_words(job: dict[str, Any]) -> str:
    """How far the job of a status is, and what it waits for."""
    percent = 100 * job["done"] // job["total"] if job["total"] else 100
    return f"{percent}%" + (f", {job['state']}: {job['reason']}" if job["reason"] else "")


def is_running(image: Image, kind: str) -> bool:
    """Whether the image of a status has a job of this kind that has not ended."""
    job = image["job"]
    return job is not None and job["type"] == kind and job["state"] in ("running", "waiting", "paused")
