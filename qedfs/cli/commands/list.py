"""`qedfs list`: the mounts of this user, for root of all users, and what each is doing.

Owns the keys of `list --json`, the state of a mount whose server does not answer, and that such a mount delays no
other. Must not know how mounts are found (`cli/found_mounts.py`), nor how the list is laid out
(`cli/ui/list_lines.py`).
"""

from __future__ import annotations

import os
import pwd
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import click

from qedfs.cli.found_mounts import FoundMount, qedfs_mounts
from qedfs.cli.takeovers import is_between_servers
from qedfs.cli.ui.list_lines import list_lines
from qedfs.cli.ui.output import print_json, terminal_width
from qedfs.control.qmp.client import Client, Gone, NotServed
from qedfs.errors import QedfsError, TimedOut

ANSWER_SECONDS = 3.0  # a server answers from memory
LATE_SECONDS = 4.0  # of grace for the calls between two waits, each of which has a deadline of its own
ASKED_AT_ONCE = 32

Listed = dict[str, Any]

_ENDING: Listed = {"state": "ending", "error": "the server is ending"}
_RESTARTING: Listed = {"state": "restarting", "error": "another server takes the mount over"}


@click.command("list", short_help="Show all mounts.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_mounts(as_json: bool) -> None:
    """Show the mounts of this user; as root, those of all users.

    A mount whose server has died, or gives no answer within three seconds, is shown with what to do about it. It does
    not delay the others.
    """
    found = ask_all(qedfs_mounts())
    if as_json:
        print_json({"mounts": found})
        return
    click.echo("\n".join(list_lines(found, terminal_width())))


def ask_all(mounts: Sequence[FoundMount]) -> list[Listed]:
    """Ask the server of each mount, many at a time. A server that does not answer costs its own entry only."""
    found = [_unanswered(mount) for mount in mounts]

    def ask(entry: Listed, mount: FoundMount) -> None:
        entry.update(_asked(mount))

    for at in range(0, len(found), ASKED_AT_ONCE):
        part = zip(found[at : at + ASKED_AT_ONCE], mounts[at : at + ASKED_AT_ONCE], strict=True)
        # Daemon threads: if one hangs in a call of the kernel, the command ends without it.
        threads = [threading.Thread(target=ask, args=pair, daemon=True) for pair in part]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + ANSWER_SECONDS + LATE_SECONDS
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
    return [dict(entry) for entry in found]


def _unanswered(mount: FoundMount) -> Listed:
    return {
        "mountpoint": mount.mountpoint,
        "source": mount.source,
        "user": _name_of(mount.user),
        "uid": mount.user,
        "copies": list(mount.copies),
        "state": "silent",
        "error": f"the server has given no answer for {ANSWER_SECONDS:g} s; qedfs umount waits for it",
        "pid": None,
        "socket": None,
        "image_count": None,
        "states": None,
        "populated": None,
        "total": None,
    }


def _asked(mount: FoundMount) -> Listed:
    """What is to be changed in the entry of a mount after asking its server."""
    try:
        with Client.reach(mount.mountpoint, deadline=time.monotonic() + ANSWER_SECONDS) as client:
            pid = {"pid": client.server_pid or None}  # known even if there is no answer
            try:
                client.negotiate()
                return {**pid, **_served(client.execute("x-qedfs-status"))}
            except Gone:
                return {**pid, **(_RESTARTING if is_between_servers(mount.mountpoint) else _ENDING)}
            except TimedOut:
                return pid
            except QedfsError as exc:
                return {**pid, "state": "silent", "error": str(exc)}
    except TimedOut:
        return {}
    except NotServed:
        return _unserved(mount)


def _served(status: dict[str, Any]) -> Listed:
    images = status["images"]
    return {
        "state": "served",
        "error": None,
        "socket": status["socket"],
        "image_count": len(images),
        "states": dict(Counter(image["state"] for image in images)),
        "populated": sum(image["populated"] or 0 for image in images),
        "total": sum(image["total"] or 0 for image in images),
    }


def _unserved(mount: FoundMount) -> Listed:
    if is_between_servers(mount.mountpoint):
        return _RESTARTING
    if _is_dead(mount):
        return {"state": "dead", "error": f"the server has died; run: qedfs umount {mount.mountpoint}"}
    return {
        "state": "unreachable",
        "error": "the server cannot be reached from here; was it started in a container? There, run: qedfs umount",
    }


def _is_dead(mount: FoundMount) -> bool:
    """Whether the kernel has no server for the mount any more. False if that cannot be found out in time.

    A program of its own asks: it can be killed if a server that is alive leaves the request unanswered, and it can ask
    as the user who has mounted, for the kernel lets nobody else, root included, see an error of the file system.
    """
    as_root = os.getuid() == 0
    try:
        done = subprocess.run(  # noqa: S603 - no shell
            ["stat", "-f", "--format=%T", "--", mount.mountpoint],  # noqa: S607 - as PATH has it, for umount too
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, "LC_ALL": "C"},
            timeout=ANSWER_SECONDS,
            check=False,
            user=mount.user if as_root and mount.user >= 0 else None,
            group=mount.group if as_root and mount.group >= 0 else None,
            extra_groups=[] if as_root else None,
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return "Transport endpoint is not connected" in done.stderr


def _name_of(uid: int) -> str:
    """The name of a user; the number if the user database has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except (KeyError, OverflowError):
        return str(uid)
