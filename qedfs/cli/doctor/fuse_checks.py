"""Whether this user can mount a FUSE file system here, and what the kernel's settings for FUSE mean for a mount.

Owns the rules for /dev/fuse, privileges, fusermount3, /etc/fuse.conf and /proc/sys/fs/fuse. Must not mount anything.
The functions take what was read, so each case can be shown without a machine that has it; `checks` reads it here.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from qedfs.cli.doctor.finding import Finding, fail, ok, warn

DEVICE = Path("/dev/fuse")
SETTINGS = Path("/proc/sys/fs/fuse")
CONFIGURATION = Path("/etc/fuse.conf")
STATUS = Path("/proc/self/status")

_CAP_SYS_ADMIN = 1 << 21  # <linux/capability.h>
_VERSION_SECONDS = 2.0
# A reader waits up to `mount --source-timeout` (30 s by default), and the kernel looks at its requests every 15 s
# (FUSE_TIMEOUT_TIMER_FREQ in fs/fuse/dev.c).
LEAST_REQUEST_SECONDS = 60
LEAST_PAGES = 256  # of a request: 1 MiB, the kernel's default

_IN_CONTAINER = "in a container: run it with --device /dev/fuse --cap-add SYS_ADMIN"
_INSTALL = "install fuse3 (apt, dnf and pacman call it that)"


def checks() -> Sequence[tuple[str, Callable[[], Finding]]]:
    """The checks with their names."""
    return (
        ("/dev/fuse", lambda: device(_opened(DEVICE))),
        ("privileges", lambda: privileges(STATUS.read_text(), os.getuid())),
        ("fusermount3", lambda: fusermount(shutil.which("fusermount3"), os.getuid())),
        ("allow_other", lambda: allow_other(_text(CONFIGURATION), os.getuid())),
        (
            "FUSE time limit",
            lambda: time_limit(_number("max_request_timeout"), _number("default_request_timeout")),
        ),
        ("FUSE request size", lambda: request_size(_number("max_pages_limit"))),
    )


def device(error: OSError | None) -> Finding:
    """`error`: what opening /dev/fuse gave; None if it could be opened."""
    check = "/dev/fuse"
    if error is None:
        return ok(check, "can be opened")
    found = f"cannot be opened ({error.strerror})"
    if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        return fail(check, found, f"load the kernel's module as root (modprobe fuse), or {_IN_CONTAINER}")
    if error.errno == errno.EACCES:
        return fail(check, found, "as root: chmod 666 /dev/fuse, or add the user to the group that owns it")
    return fail(check, found, _IN_CONTAINER)


def privileges(status: str, user: int) -> Finding:
    """`status`: /proc/self/status. Root mounts itself; fusermount3 mounts for others, if it may become root."""
    check = "privileges"
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    if user == 0:
        if int(fields["CapEff"], 16) & _CAP_SYS_ADMIN:
            return ok(check, "root, may mount")
        return fail(check, "root without CAP_SYS_ADMIN, may not mount", _IN_CONTAINER)
    if fields.get("NoNewPrivs", "0").strip() == "1":
        return fail(
            check,
            "no new privileges (NoNewPrivs), so that fusermount3 cannot mount",
            "start qedfs without that: NoNewPrivileges=no in the unit, or the container without no-new-privileges",
        )
    if not int(fields["CapBnd"], 16) & _CAP_SYS_ADMIN:
        return fail(check, "CAP_SYS_ADMIN is out of bounds, so that fusermount3 cannot mount", _IN_CONTAINER)
    return ok(check, f"user {user}, mounts with fusermount3")


def fusermount(path: str | None, user: int) -> Finding:
    """`path`: of fusermount3, None if PATH does not have it. Root needs it only if mount(2) is forbidden."""
    check = "fusermount3"
    missing = fail if user else warn
    if path is None:
        return missing(check, "is not in PATH", f"{_INSTALL}; only root can mount without it")
    found = os.stat(path)
    version = _version(path)
    why = why_not_privileged(found.st_mode, found.st_uid, nosuid=bool(os.statvfs(path).f_flag & os.ST_NOSUID))
    if why is None:
        return ok(check, f"{version}, {path}, setuid root")
    return missing(check, f"{version}, {path}, {why[0]}", f"{why[1]}; only root can mount without that")


def why_not_privileged(mode: int, owner: int, *, nosuid: bool) -> tuple[str, str] | None:
    """(why, way out) if a program with this mode does not become root; None if it does."""
    if owner != 0:
        return f"belongs to user {owner}, not to root", _INSTALL
    if not mode & stat.S_ISUID:
        return "not setuid", "as root: chmod u+s it"
    if nosuid:
        return "on a file system that is mounted nosuid", "mount that file system without nosuid"
    return None


def allow_other(configuration: str | None, user: int) -> Finding:
    """`configuration`: the text of /etc/fuse.conf, None if it cannot be read."""
    check = "allow_other"
    if any(line.strip() == "user_allow_other" for line in (configuration or "").splitlines()):
        return ok(check, "users may mount with --allow-other (user_allow_other in /etc/fuse.conf)")
    if user == 0:
        return ok(check, "only root may mount with --allow-other (no user_allow_other in /etc/fuse.conf)")
    why = "/etc/fuse.conf cannot be read" if configuration is None else "no user_allow_other in /etc/fuse.conf"
    return warn(
        check, f"this user may not mount with --allow-other ({why})", "as root, add a line with user_allow_other to it"
    )


def time_limit(most: int | None, default: int | None) -> Finding:
    """`most`, `default`: seconds after which the kernel ends a mount that has not answered a request; 0 is never.

    Linux 6.14 and later have these settings (Documentation/admin-guide/sysctl/fs.rst); None if they are not there.
    """
    check = "FUSE time limit"
    limits = [limit for limit in (most, default) if limit]
    if not limits:
        return ok(check, "none" if most is not None else "none (this kernel has no such setting)")
    found = f"the kernel ends a mount whose answer takes {min(limits)} s"
    if min(limits) >= LEAST_REQUEST_SECONDS:
        return ok(check, found)
    return warn(
        check,
        f"{found}, and a read may wait 30 s for a server, or --source-timeout",
        "as root: sysctl fs.fuse.max_request_timeout=0 fs.fuse.default_request_timeout=0",
    )


def request_size(pages: int | None) -> Finding:
    """`pages`: the most pages that the kernel puts into a request; None if there is no such setting."""
    check = "FUSE request size"
    if pages is None:
        return ok(check, "1 MiB (this kernel has no setting for it)")
    found = f"{pages * os.sysconf('SC_PAGE_SIZE') >> 10} KiB"
    if pages >= LEAST_PAGES:
        return ok(check, found)
    return warn(check, f"{found}: large reads and writes are slow", "as root: sysctl fs.fuse.max_pages_limit=256")


def _opened(path: Path) -> OSError | None:
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as exc:
        return exc
    return None


def _version(path: str) -> str:
    """What fusermount3 says of its version."""
    try:
        done = subprocess.run(  # noqa: S603 - a program of the system, without a shell
            [path, "--version"], capture_output=True, text=True, errors="replace", timeout=_VERSION_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return "of unknown version"
    return done.stdout.strip().rpartition(" ")[2] or "of unknown version"


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return ""
    except OSError:
        return None


def _number(name: str) -> int | None:
    try:
        return int((SETTINGS / name).read_bytes())
    except (OSError, ValueError):
        return None
