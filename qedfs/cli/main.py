"""The `qedfs` command: the click group of all commands, and the exit status."""

from __future__ import annotations

import io
import sys
from typing import Any

import click

from qedfs import __version__
from qedfs.cli.commands.check import check
from qedfs.cli.commands.create import create
from qedfs.cli.commands.export import export
from qedfs.cli.commands.info import info
from qedfs.cli.commands.map import show_map
from qedfs.cli.commands.mount import mount
from qedfs.cli.commands.profile import profile
from qedfs.cli.commands.status import status
from qedfs.cli.commands.stream import stream
from qedfs.cli.commands.umount import umount
from qedfs.cli.commands.wait import wait
from qedfs.cli.exit_status import guarded
from qedfs.cli.stdio import drop_unwritten, open_closed


class Group(click.Group):
    """A click group that reports every failure through `exit_status.py`."""

    def main(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - click's own signature
        """Run the command named on the command line and exit."""
        open_closed()
        kwargs["standalone_mode"] = False
        kwargs.setdefault("prog_name", "qedfs")  # also as `python -m qedfs`
        if isinstance(sys.stdout, io.TextIOWrapper):
            # A name that is not UTF-8, or that the terminal's encoding cannot show, must not make a command fail.
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            sys.exit(guarded(lambda: super(Group, self).main(*args, **kwargs)))
        finally:
            drop_unwritten()


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="qedfs")
def main() -> None:
    """Mount QED overlays of remote disk images as flat raw files, and stream them in.

    Sizes take K M G T (1024), durations s m h.

    Exit codes: 0 success, 1 other failure, 2 usage, 3 bad overlay, 4 source unreachable or unusable, 5 source changed,
    6 no space, 7 timed out, 8 in use, 9 refused by policy, 10 no mount there, 130 interrupted.

    Completion of commands and options in bash: eval "$(_QEDFS_COMPLETE=bash_source qedfs)"; zsh_source and fish_source
    are there too.
    """


for command in (create, mount, umount, status, wait, stream, info, show_map, check, export, profile):
    main.add_command(command)
