"""What the shell offers for places, images and rules when TAB is pressed.

Owns the choice. It never fails and never waits for long: a shell has nowhere to show a message, and no way to go on
meanwhile. So mountpoints come from the kernel's table, and a server that does not answer has no images. Must not know
how a shell is told (click does).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from qedfs.cli.found_mounts import mount_meant, qedfs_mounts
from qedfs.cli.option_types import source_error_words
from qedfs.control.qmp.client import Client
from qedfs.errors import QedfsError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

ANSWER_SECONDS = 1.0


def mountpoints(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem] | list[str]:
    """The mountpoints that begin with what is typed; folders if there is none."""
    del ctx, param
    try:
        found = [place for mount in qedfs_mounts() for place in _spellings(mount.mountpoint, incomplete)]
    except OSError:  # no table of mounts, or a working directory that is gone
        found = []
    # Imported here: every other call of a command does without.
    from click.shell_completion import CompletionItem

    return _offered(found, incomplete) or [CompletionItem(incomplete, type="dir")]


def images(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """The images of the mount that is typed before."""
    del param
    try:
        mountpoint = mount_meant(ctx.params.get("mountpoint") or ctx.params.get("overlay"))
        with Client.connect(mountpoint, deadline=time.monotonic() + ANSWER_SECONDS) as client:
            names = [image["name"] for image in client.execute("x-qedfs-status")["images"]]
    except (QedfsError, OSError):
        return []
    return _offered(names, incomplete)


def rules(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """What reads do while a source is away; or an image, if no word is there yet."""
    named = [] if ctx.params.get(str(param.name)) else images(ctx, param, incomplete)
    return [*source_error_words(ctx, param, incomplete), *named]


def files(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The shell's own names of files."""
    del ctx, param
    from click.shell_completion import CompletionItem  # see above

    return [CompletionItem(incomplete, type="file")]


def _spellings(mountpoint: str, incomplete: str) -> Iterator[str]:
    """The mountpoint as it continues a path that may be relative, and otherwise in full."""
    typed = os.path.dirname(incomplete)
    folder = os.path.join(os.path.abspath(typed), "")
    if mountpoint.startswith(folder):
        yield os.path.join(typed, mountpoint.removeprefix(folder))
    else:
        yield mountpoint


def _offered(names: list[str], incomplete: str) -> list[str]:
    # click tells the shell one name a line.
    return [name for name in names if name.startswith(incomplete) and "\n" not in name]
