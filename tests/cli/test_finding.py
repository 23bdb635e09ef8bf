"""A check of `qedfs doctor` always ends in a finding, and a finding is one line."""

from __future__ import annotations

import threading

from qedfs.cli.doctor.finding import Finding, Verdict, fail, look, ok, warn
from qedfs.errors import Refused


def test_a_line_says_what_was_found_and_the_way_out() -> None:
    assert str(ok("kernel", "Linux 7")) == "ok    kernel              Linux 7"
    assert str(warn("kernel", "old", "take a newer one")) == "warn  kernel              old; take a newer one"
    assert str(fail("kernel", "none")) == "FAIL  kernel              none"


def test_an_error_is_a_finding_with_its_exit_code() -> None:
    def examine() -> Finding:
        raise Refused("leads to 169.254.169.254")

    assert look("server", examine) == fail("server", "leads to 169.254.169.254", exit_code=Refused.exit_code)


def test_a_machine_that_trips_one_check_does_not_hide_the_others() -> None:
    fields: dict[str, str] = {}
    found = look("privileges", lambda: ok("privileges", fields["CapEff"]))
    assert (found.verdict, found.found) == (Verdict.WARN, "cannot be looked at (KeyError: 'CapEff')")


def test_a_check_that_never_ends_is_abandoned() -> None:
    dead_server = threading.Event()

    def examine() -> Finding:
        dead_server.wait()
        return ok("disk", "is there")

    try:
        found = look("disk", examine, seconds=0.01)
    finally:
        dead_server.set()
    assert found.verdict is Verdict.FAIL
    assert found.found == "no answer within 0.01 s"
