"""`qedfs doctor`: whether this machine, and the server of a backing, have what qedfs needs.

Owns the order of the checks, the form of their findings, and the exit code. Must not know what a check looks at
(`cli/doctor/`), nor import at its head what may be broken: libcurl, trio, idna.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from qedfs.cli.credentials_option import credentials as read
from qedfs.cli.credentials_option import credentials_option
from qedfs.cli.doctor import fuse_checks, library_checks, machine_checks
from qedfs.cli.doctor.finding import Finding, Verdict, look
from qedfs.cli.given_once import GivenOnce
from qedfs.cli.option_types import DURATION
from qedfs.cli.ui.layout import printable
from qedfs.cli.ui.output import print_json

if TYPE_CHECKING:
    from qedfs.source.credentials import Credentials
    from qedfs.source.url import Location


@click.command(cls=GivenOnce, short_help="Check this machine, and a server.")
@click.argument("url", required=False)
@click.option(
    "--timeout", type=DURATION, default="30s", show_default=True, metavar="TIME", help="How long to ask the server."
)
@credentials_option
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(url: str | None, timeout: float, credentials: str | None, as_json: bool) -> None:
    """Check that this machine has what qedfs needs; given a URL, ask its server what it can do, too.

    Prints a line for each check: ok, warn (qedfs works, but not all of it or not as well), or FAIL (it does not work),
    what was found, and the way out. Nothing is mounted, and at most 32 MiB are downloaded. The output contains no
    passwords: put it into a report of a bug.

    Exit codes: 0 if nothing says FAIL, otherwise that of the first FAIL: 1 for this machine, 4 for a server that does
    not answer or does not serve a disk, 7 if --timeout has passed, 9 if the server leads to a forbidden address.

    With --json: `ok` (whether nothing says FAIL), `checks` (a list of `check`, the name; `verdict`, "ok", "warn" or
    "fail"; `found`, text; and `way_out`, text or null), and `source`, null without a URL, with `url` and
    `redirected_to` (without secrets), `size` of the file, `digest`, `etag` and `last_modified` of its version, `format`
    ("raw", "qcow2" or "qed"), `compression` and `disk_size` of the disk in it, `round_trip_seconds` and
    `bytes_per_second`. Sizes are in bytes; what is not known is null.
    """
    # What cannot be understood is said at once.
    target = None if url is None else (_location(url), read(credentials))
    report = _Report(as_json=as_json)
    for checks in (library_checks, machine_checks, fuse_checks):
        for check, examine in checks.checks():
            report.add(look(check, examine))
    facts = None if target is None else _ask(*target, timeout, report.add)
    if as_json:
        print_json({"ok": report.exit_code == 0, "checks": [_shown(one) for one in report.findings], "source": facts})
    raise click.exceptions.Exit(report.exit_code)


class _Report:
    """The findings so far; prints each at once, unless they are printed as JSON in the end."""

    def __init__(self, *, as_json: bool) -> None:
        self.findings: list[Finding] = []
        self._as_json = as_json

    def add(self, finding: Finding) -> None:
        self.findings.append(finding)
        if not self._as_json:
            click.echo(printable(str(finding)))
            sys.stdout.flush()  # a pipe, too, shows how far it has come

    @property
    def exit_code(self) -> int:
        return next((one.exit_code for one in self.findings if one.verdict is Verdict.FAIL), 0)


def _shown(finding: Finding) -> dict[str, Any]:
    shown = dataclasses.asdict(finding)
    del shown["exit_code"]
    return shown


def _location(url: str) -> Location:
    # Imported here, since it imports idna, which may be what is broken.
    from qedfs.cli.backing_argument import location_of

    return location_of(url, os.getcwd(), option="URL")


def _ask(
    location: Location, credentials: Credentials, seconds: float, report: Callable[[Finding], None]
) -> dict[str, Any]:
    # Imported here because loading libcurl and trio is slow, and one of them may be what is broken.
    import trio

    from qedfs.cli.doctor.server_checks import examine

    facts = trio.run(examine, location, credentials, seconds, report)
    return dataclasses.asdict(facts)
