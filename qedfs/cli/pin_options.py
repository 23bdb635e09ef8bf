"""The options `--pin` and `--identity` of all commands that fetch: what counts as another version of a backing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from qedfs.source.pinning import By

F = TypeVar("F", bound=Callable[..., Any])

_PIN = click.option(
    "--pin",
    type=click.Choice([by.value for by in By]),
    default=By.ALL.value,
    show_default=True,
    help="What must stay the same for the backing to be the same version: all that the server tells; the ETag alone, "
    "or the date alone, where servers behind one name differ in the other; the size and the sampled bytes; or nothing, "
    "and you answer for it.",
)
_IDENTITY = click.option(
    "--identity",
    metavar="NAME",
    help="Your own name for this version of the backing. It is stored: where a later NAME is the same, so is the "
    "version, whatever the server says of it; where it is another, that is another version.",
)


def pin_options(command: F) -> F:
    """Add `--pin` and `--identity`."""
    return _PIN(_IDENTITY(command))
