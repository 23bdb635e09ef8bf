"""`qedfs doctor`: whether this machine has what qedfs needs."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import click

from qedfs.cli.doctor import fuse_checks, library_checks, machine_checks
from qedfs.cli.doctor.finding import Finding, Verdict, look
from qedfs.cli.ui.layout import printable
from qedfs.cli.ui.output import print_json


@click.command(short_help="Check this machine.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(as_json: bool) -> None:
    """Check that this machine has what qedfs needs.

    Prints a line for each check: ok, warn (qedfs works, but not all of it or not as well), or FAIL (it does not work),
    what was found, and the way out. Nothing is mounted. The output contains no passwords: put it into a bug report.

    Exit codes: 0 if nothing says FAIL, otherwise 1.

    With --json: `ok` (whether nothing says FAIL) and `checks`, a list of `check`, the name; `verdict`, "ok", "warn" or
    "fail"; `found`, text; and `way_out`, text or null.
    """
    report = _Report(as_json=as_json)
    for checks in (library_checks, machine_checks, fuse_checks):
        for check, examine in checks.checks():
            report.add(look(check, examine))
    if as_json:
        print_json({"ok": report.exit_code == 0, "checks": [_shown(one) for one in report.findings]})
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
