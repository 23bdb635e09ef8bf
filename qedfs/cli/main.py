"""The `qedfs` command: the click group of all commands, and the exit status.

Owns the table of commands. A command's module is imported when the command is used: libraries and rooms that it does
not need cost more than what most commands do.
"""

from __future__ import annotations

import functools
import gc
import importlib
from typing import Any

import click

from qedfs import __version__
from qedfs.cli.frame import run_framed
from qedfs.errors import UsageError

# Command -> its module in `cli/commands/`, and what it is called there.
COMMANDS = {
    "activate": ("activate", "activate"),
    "check": ("check", "check"),
    "commit": ("commit", "commit"),
    "create": ("create", "create"),
    "defrag": ("defrag", "defrag"),
    "doctor": ("doctor", "doctor"),
    "export": ("export", "export"),
    "info": ("info", "info"),
    "list": ("list", "list_mounts"),
    "map": ("map", "show_map"),
    "migrate": ("migrate", "migrate"),
    "mount": ("mount", "mount"),
    "populate": ("populate", "populate"),
    "profile": ("profile", "profile"),
    "rebase": ("rebase", "rebase"),
    "release": ("release", "release"),
    "resize": ("resize", "resize"),
    "snapshot": ("snapshot", "snapshot"),
    "source": ("source", "source"),
    "status": ("status", "status"),
    "stream": ("stream", "stream"),
    "umount": ("umount", "umount"),
    "upgrade": ("upgrade", "upgrade"),
    "wait": ("wait", "wait"),
}


class Group(click.Group):
    """A click group that imports a command when it is used, and reports every failure through `exit_status.py`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all commands."""
        return sorted({*COMMANDS, *self.commands})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of this name; None if there is none."""
        if cmd_name in COMMANDS and cmd_name not in self.commands:
            module, name = COMMANDS[cmd_name]
            found: click.Command = getattr(importlib.import_module(f"qedfs.cli.commands.{module}"), name)
            self.add_command(found, cmd_name)
        return super().get_command(ctx, cmd_name)

    def main(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - click's own signature
        """Run the command named on the command line and exit."""
        kwargs["standalone_mode"] = False
        kwargs.setdefault("prog_name", "qedfs")  # also as `python -m qedfs`
        run_framed(functools.partial(super().main, *args, **kwargs))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Also understand `qedfs version`, `qedfs help` and `qedfs help COMMAND`."""
        if args[:1] == ["help"]:
            args = [*args[1:], "--help"]
        elif args == ["version"]:
            args = ["--version"]
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command. Suggests similar names for one that does not exist."""
        name = args[0]
        if not (ctx.resilient_parsing or name.startswith("-") or name in self.list_commands(ctx)):
            import difflib  # here, as it takes 3 ms

            similar = difflib.get_close_matches(name, self.list_commands(ctx))
            hint = f"did you mean {' or '.join(similar)}?" if similar else "qedfs --help lists them"
            raise UsageError(f"there is no command {name}; {hint}")
        found = super().resolve_command(ctx, args)
        # All is loaded that most commands need. Only what the command makes from now on can become garbage.
        gc.freeze()
        gc.enable()
        return found


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", prog_name="qedfs")
def main() -> None:
    """Mount QED overlays of remote disk images as flat raw files, and stream them in.

    Sizes take K M G T (1024), durations s m h.

    Exit codes: 0 success, 1 other failure, 2 usage, 3 bad overlay, 4 source unreachable or unusable, 5 source changed,
    6 no space, 7 timed out, 8 in use, 9 refused by policy, 10 no mount there, 130 interrupted.

    Completion in bash: eval "$(_QEDFS_COMPLETE=bash_source qedfs)"; zsh_source and fish_source are there too.
    """
