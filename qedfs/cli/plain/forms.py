"""Which command lines are so plain that their command is called without click.

Owns these forms: a command with places and no options. Everything else, mistakes included, is left to `cli/main.py`,
so both understand the same. Must not know what a command does.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Sequence

from qedfs import __version__

COMPLETING = "_QEDFS_COMPLETE"  # click's variable: a shell asks for completions
# Command -> how many places it takes at least and at most.
_PLACES = {"check": (1, 1), "status": (0, 1), "wait": (0, 2), "umount": (1, 1)}


def plain_call(words: Sequence[str]) -> Callable[[], object] | None:
    """What to call for these words of a command line; None if it takes click to tell."""
    if COMPLETING in os.environ or not words:
        return None
    command, *places = words
    if not places and command in ("--version", "-V", "version"):
        return functools.partial(print, f"qedfs, version {__version__}")
    least, most = _PLACES.get(command, (1, 0))
    if not least <= len(places) <= most or any(not place or place.startswith("-") for place in places):
        return None
    found: Callable[..., object] = getattr(importlib.import_module(f"qedfs.cli.plain.{command}"), command)
    return functools.partial(found, *places)
