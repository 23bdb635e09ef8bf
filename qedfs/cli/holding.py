"""How a mount gets a holder: the command line of `mount/holder.py`, and of the servers that it starts.

Must not import anything that takes time to load: it runs before the process that serves.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import qedfs
from qedfs.host.runtime import mount_folder

PACKAGE = Path(qedfs.__file__).parent


def server_command(*options: str) -> list[str]:
    """The command `qedfs mount` with these options, by the interpreter that runs us."""
    return [sys.executable, "-P", "-m", "qedfs", "mount", *options]


def holder_command(
    arguments: Sequence[str], mountpoint: str, *, log: str, most_deaths: int, ready_fd: int = -1
) -> list[str]:
    """The command of a holder that starts `qedfs mount ARGUMENTS` as often as needed.

    `log`: how its own lines look: "json", "journal" or "text". `most_deaths`: of servers in a minute, before the holder
    ends the mount. `ready_fd`: for the first server.

    Raises:
        Inaccessible: there is no place for the mount's runtime folder.
    """
    options = {
        "mountpoint": os.path.realpath(mountpoint),
        "folder": mount_folder(mountpoint),
        "package": PACKAGE.parent,
        "log": log,
        "most-deaths": most_deaths,
        "ready-fd": ready_fd,
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    # -I -S: it loads nothing but the standard library, from where nobody else can put anything.
    holder = [sys.executable, "-I", "-S", str(PACKAGE / "mount" / "holder.py")]
    return [*holder, *words, "--", *server_command(*arguments)]


def hold(arguments: Sequence[str], mountpoint: str, *, log: str, most_deaths: int) -> None:
    """Become the holder: this process goes on as another program, under its number. Returns never.

    Raises what `holder_command` raises.
    """
    command = holder_command(arguments, mountpoint, log=log, most_deaths=most_deaths)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(command[0], command, environment())  # noqa: S606 - no shell


def environment() -> dict[str, str]:
    """Our environment, changed so that Python finds the same modules, and none in the current working directory.

    `-m` would search that folder first (hence `-P`). So would an empty entry in PYTHONPATH, as in
    "$PYTHONPATH:/opt/lib". Otherwise anybody who may write to a shared folder could put a secrets.py there, which root
    would run.
    """
    entries = [os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    home = str(PACKAGE.parent)
    if sys.path[:1] == [home] and not sys.flags.safe_path:
        entries.append(home)  # `python -m qedfs` in a checkout that is not installed
    path = {"PYTHONPATH": os.pathsep.join(entries)} if entries else {}
    return {**{name: value for name, value in os.environ.items() if name != "PYTHONPATH"}, **path}
