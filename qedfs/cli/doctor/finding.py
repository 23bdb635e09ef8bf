"""A finding of `qedfs doctor`: what was looked at, what is there, whether that will do, and the way out.

Owns the verdicts, the wording of a line and the time that a check may take. Must not know any check.
"""

from __future__ import annotations

import dataclasses
import enum
import threading
from collections.abc import Callable

from qedfs.errors import QedfsError

CHECK_SECONDS = 5.0  # for one check of this machine; each takes some milliseconds
VERDICT_WIDTH, CHECK_WIDTH = 6, 20  # columns of a line


class Verdict(enum.StrEnum):
    """Whether what was found will do."""

    OK = "ok"
    WARN = "warn"  # qedfs works without it, but not as well as it could, or one option does not
    FAIL = "fail"  # qedfs does not work


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check. `way_out`: what the user can do, if the verdict is not OK.

    `exit_code`: that of the command if the verdict is FAIL.
    """

    check: str
    verdict: Verdict
    found: str
    way_out: str | None = None
    exit_code: int = QedfsError.exit_code

    def __str__(self) -> str:
        """One line for people."""
        verdict = self.verdict.upper() if self.verdict is Verdict.FAIL else self.verdict
        rest = self.found if self.way_out is None else f"{self.found}; {self.way_out}"
        return f"{verdict:<{VERDICT_WIDTH}}{self.check:<{CHECK_WIDTH}}{rest}"


def ok(check: str, found: str) -> Finding:
    """All is well."""
    return Finding(check, Verdict.OK, found)


def warn(check: str, found: str, way_out: str) -> Finding:
    """Not as well as it could be."""
    return Finding(check, Verdict.WARN, found, way_out)


def fail(check: str, found: str, way_out: str | None = None, *, exit_code: int = QedfsError.exit_code) -> Finding:
    """Something that is needed is not there."""
    return Finding(check, Verdict.FAIL, found, way_out, exit_code)


def failed(check: str, exc: QedfsError) -> Finding:
    """An error with its exit code. Its message contains the way out, if there is one."""
    return fail(check, str(exc), exit_code=exc.exit_code)


def look(check: str, examine: Callable[[], Finding], seconds: float = CHECK_SECONDS) -> Finding:
    """Run a check. It may end in an error, or not at all: a path may lead to a dead file server.

    A thread that does not come back is abandoned. It does not keep the process from ending.
    """
    findings: list[Finding] = []

    def run() -> None:
        try:
            findings.append(examine())
        except QedfsError as exc:
            findings.append(failed(check, exc))
        except Exception as exc:
            # One check that a strange machine trips must not hide what the others find.
            findings.append(warn(check, f"cannot be looked at ({type(exc).__name__}: {exc})", "look by hand"))

    thread = threading.Thread(target=run, name=check, daemon=True)
    thread.start()
    thread.join(seconds)
    if not findings:
        return fail(check, f"no answer within {seconds:g} s", "is a file server that this machine mounts away?")
    return findings[0]
