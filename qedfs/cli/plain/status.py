"""What `qedfs status` does, without click.

Owns how it is printed (text, JSON, again and again with `--watch`), and that the next server is asked if one ends. Must
not know the fields (`control/monitoring/status.py`), nor their layout (`cli/ui/status_lines.py`).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NoReturn

from qedfs.cli.served_images import connect
from qedfs.cli.takeovers import Patience, is_between_servers
from qedfs.cli.ui.output import console, echo, print_json, print_json_line, terminal_width
from qedfs.cli.ui.status_lines import fitted_lines, status_lines
from qedfs.control.qmp.client import Client, Gone

if TYPE_CHECKING:
    from rich.console import Console

WATCH_SECONDS = 1.0
ANSWER_SECONDS = 10.0  # the server answers from memory


def status(mountpoint: str | None = None, *, as_json: bool = False, watch: bool = False) -> None:
    """See the command's help."""
    if mountpoint is None:
        from qedfs.cli.found_mounts import mount_meant  # here, because whoever names the mount does not need it

        mountpoint = mount_meant(None)
    place, patience = mountpoint, Patience()
    while True:
        try:
            with connect(place, deadline=time.monotonic() + ANSWER_SECONDS) as client:
                if watch:
                    _watch(client, patience, as_json=as_json)
                found = _ask(client)
        except Gone:
            if is_between_servers(place):
                patience.ended(place)
                continue
            if watch:
                return
            raise
        break
    if as_json:
        print_json(found)
        return
    echo("\n".join(status_lines(found, terminal_width())))


def _ask(client: Client) -> dict[str, Any]:
    client.deadline = time.monotonic() + ANSWER_SECONDS
    found: dict[str, Any] = client.execute("x-qedfs-status")
    return found


def _watch(client: Client, patience: Patience, *, as_json: bool) -> None:
    """Go on until the server ends. Raises Gone then."""
    _ask(client)
    patience.answered()
    screen = console()
    if screen.is_terminal and not as_json:
        _watch_on(screen, client)
    else:
        _watch_in_lines(client, as_json=as_json)


def _watch_on(terminal: Console, client: Client) -> NoReturn:
    """Draw until the server ends."""
    # Imported here because loading rich is slow, and a status without --watch is printed without it.
    from rich.text import Text

    from qedfs.cli.ui.screen import Screen

    with Screen(terminal, transient=False) as screen:
        while True:
            found = _ask(client)
            screen.show([Text(line) for line in fitted_lines(found, screen.width, screen.height)])
            time.sleep(WATCH_SECONDS)


def _watch_in_lines(client: Client, *, as_json: bool) -> NoReturn:
    """Print until the server ends."""
    while True:
        found = _ask(client)
        if as_json:
            print_json_line(found)
        else:
            echo("\n".join([*status_lines(found), ""]))
        time.sleep(WATCH_SECONDS)
