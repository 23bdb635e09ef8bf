"""How a mount gets a holder: this process becomes it, and a child of this process is the first server.

Owns that split, and the command line of `mount/holder.py`. Must not know what the holder does.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Sequence

from qedfs.cli.server_command import PACKAGE, environment, server_command
from qedfs.host.runtime import mount_folder, place_of
from qedfs.mount.holder_machine import HEEDED


def holder_command(
    arguments: Sequence[str], mountpoint: str, *, log: str, most_deaths: int, first_pid: int, first_fd: int
) -> list[str]:
    """The command of a holder that starts `qedfs mount ARGUMENTS` as often as needed.

    `log`: how its own lines look: "json", "journal" or "text". `most_deaths`: of servers in a minute, before the holder
    ends the mount. `first_pid`, `first_fd`: the server that runs already, and the socket to it.

    Raises:
        Inaccessible: there is no place for the mount's runtime folder.
    """
    options = {
        "mountpoint": place_of(mountpoint),
        "folder": mount_folder(mountpoint),
        "package": PACKAGE.parent,
        "log": log,
        "most-deaths": most_deaths,
        "first-pid": first_pid,
        "first-fd": first_fd,
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    # -I -S: it loads nothing but the standard library, from where nobody else can put anything.
    holder = [sys.executable, "-I", "-S", str(PACKAGE / "mount" / "holder.py")]
    return [*holder, *words, "--", *server_command(*arguments)]


def hold(
    arguments: Sequence[str], mountpoint: str, *, log: str, most_deaths: int, closed: Sequence[int] = ()
) -> int | None:
    """Become the holder, under the number of this process, and go on in a child. Returns there: its end of the socket.

    Returns None in this process if there is no room for a second one. `closed`: descriptors that only the child keeps.

    Raises what `holder_command` raises.
    """
    mount_folder(mountpoint)  # while somebody can still be told that there is no place for it
    sys.stdout.flush()
    sys.stderr.flush()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # Signals that come before the holder has its handlers wait until then.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HEEDED)
    try:
        child = os.fork()
    except OSError:
        child = -1
    if child == 0:
        ours.close()
        # A process group of its own: Ctrl-C reaches only the holder, which passes it on.
        os.setpgid(0, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return theirs.detach()
    theirs.close()
    with ours:
        if child < 0:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            return None
        for fd in closed:
            os.close(fd)
        ours.set_inheritable(True)
        numbers = {"first_pid": child, "first_fd": ours.fileno()}
        command = holder_command(arguments, mountpoint, log=log, most_deaths=most_deaths, **numbers)
        os.execve(command[0], command, environment())  # noqa: S606 - no shell
    raise AssertionError
