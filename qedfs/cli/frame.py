"""What is around every command: standard streams that are open, Ctrl-C, one line for a failure, and the exit status.

Must not know any command, nor how its words are parsed.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import NoReturn

from qedfs.cli.entry import Interruptible
from qedfs.cli.exit_status import guarded
from qedfs.cli.stdio import drop_unwritten, open_closed


def run_framed(command: Callable[[], object]) -> NoReturn:
    """Run a command and exit."""
    open_closed()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name that is not UTF-8, or that the terminal's encoding cannot show, must not make a command fail.
        sys.stdout.reconfigure(errors="backslashreplace")

    def interruptible() -> object:
        with Interruptible():
            return command()

    try:
        sys.exit(guarded(interruptible))
    finally:
        drop_unwritten()
