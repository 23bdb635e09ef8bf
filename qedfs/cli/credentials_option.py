"""The option `--credentials FILE` of all commands that contact servers. See `source/credentials.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from qedfs.cli.option_types import PLACE

if TYPE_CHECKING:
    from qedfs.source.credentials import Credentials

credentials_option = click.option(
    "--credentials",
    type=PLACE,
    metavar="FILE",
    help="Credentials for each server: header fields, client certificates, pre-shared keys; see the guide.",
)


def credentials(path: str | None) -> Credentials:
    """The credentials in the file; none without a file. Raises UsageError as `read_credentials` does."""
    # Imported here: not every command needs it.
    from qedfs.source.credentials import NO_CREDENTIALS, read_credentials

    return NO_CREDENTIALS if path is None else read_credentials(path)
