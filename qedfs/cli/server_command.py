"""The command line and the environment of a process that serves a mount.

Must not import anything that takes time to load: the parent of a daemon needs this, and starts nothing else.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import qedfs

PACKAGE = Path(qedfs.__file__).parent


def server_command(*options: str) -> list[str]:
    """The command `qedfs mount` with these options, by the interpreter that runs us."""
    return [sys.executable, "-P", "-m", "qedfs", "mount", *options]


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
