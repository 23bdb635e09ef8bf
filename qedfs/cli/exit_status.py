"""The one place where an exception becomes a line on stderr and an exit code.

Owns how a failure is shown to the user. Commands raise QedfsError and do not print it themselves.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from qedfs.cli.entry import INTERRUPTED
from qedfs.cli.ui.output import remark
from qedfs.errors import InUse, QedfsError

if TYPE_CHECKING:
    import click


def guarded(run: Callable[[], object]) -> int:
    """Run a command and return its exit code. Reports a failure on stderr."""
    try:
        result = run()
        sys.stdout.flush()
    except BrokenPipeError:
        # `qedfs status | head`: the reader has gone. What is still buffered must not raise again at interpreter exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return QedfsError.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BaseException as exc:
        return _report(exc)
    # click returns the code of `click.exceptions.Exit`. Commands return nothing.
    return result if isinstance(result, int) else 0


def explain(exc: BaseException) -> tuple[str, int]:
    """(line, exit code) of an exception."""
    cause = cause_of(exc)
    if isinstance(cause, InUse) and cause.overlay is not None:
        return in_use(cause.overlay) or str(cause), cause.exit_code
    if isinstance(cause, QedfsError):
        return str(cause), cause.exit_code
    if isinstance(cause, KeyboardInterrupt):
        return "interrupted", INTERRUPTED
    if isinstance(cause, OSError) and cause.strerror:
        name = f"{cause.filename}: " if cause.filename else ""
        return f"{name}{cause.strerror}", QedfsError.exit_code
    text = " ".join(str(cause).split())
    return f"internal error: {type(cause).__name__}: {text}", QedfsError.exit_code


def in_use(overlay: str) -> str | None:
    """Who has an overlay locked, in a line with the way out; None if that cannot be seen."""
    from qedfs.cli.mount_table import user_of  # here, as only this failure needs it

    return user_of(overlay)


def cause_of(exc: BaseException) -> BaseException:
    """The exception to report: of an exception group the first QedfsError, or else the first leaf.

    trio's nurseries wrap in groups what their tasks raise.
    """
    leaves = _leaves(exc)
    return next((leaf for leaf in leaves if isinstance(leaf, QedfsError)), leaves[0])


def _report_usage(exc: click.ClickException) -> int:
    """Print a usage error as one line that names the command whose help is relevant."""
    import click

    text = exc.format_message()
    if "\n" in text:
        # The user gave no command, so the text is the help.
        exc.show()
        return exc.exit_code
    context = exc.ctx if isinstance(exc, click.UsageError) else None
    hint = f" (see {context.command_path} --help)" if context is not None else ""
    # click ends its sentences with a full stop. Three of them stand for a secret in a URL.
    remark(f"{text if text.endswith('...') else text.removesuffix('.')}{hint}")
    return exc.exit_code


def _report(exc: BaseException) -> int:
    if isinstance(exc, SystemExit):
        raise exc
    if "click" in sys.modules:  # a command in its plain form does not load it
        import click

        if isinstance(exc, click.ClickException):
            return _report_usage(exc)
        if isinstance(exc, click.Abort):
            return INTERRUPTED
    line, exit_code = explain(exc)
    import logging  # here, because loading it takes as long as a short command

    # With --verbose the log shows the traceback of a bug.
    logging.getLogger(__name__).debug("the command failed", exc_info=exc)
    if exit_code != INTERRUPTED:
        remark(line)
    return exit_code


def _leaves(exc: BaseException) -> list[BaseException]:
    if isinstance(exc, BaseExceptionGroup):
        return [leaf for part in exc.exceptions for leaf in _leaves(part)]
    return [exc]
