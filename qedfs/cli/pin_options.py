"""The options `--pin` and `--identity` of all commands that fetch: what counts as another version of a backing.

Owns their wording and defaults. Must not know how they change a comparison (`source/pinning.py`).
"""

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
    help="What must match for the backing to be the same version: everything that the server reports; only the ETag or "
    "only the date, if servers behind one name differ in the other; the size and the sampled bytes; or nothing, at "
    "your own risk.",
)
_IDENTITY = click.option(
    "--identity",
    metavar="NAME",
    help="Your own name for this version of the backing. It is stored. A later mount with the same NAME has the same "
    "version, whatever the server reports; one with another NAME has another version.",
)


def pin_options(command: F) -> F:
    """Add `--pin` and `--identity`."""
    return _PIN(_IDENTITY(command))
