"""What the holder of a mount does to the machine: servers as processes, signals, the descriptor of /dev/fuse, its log.

Owns processes, sockets and files of the holder, and turns what happens to them into events. Must not know what follows
from an event: `holder.py` decides. Loads a few modules of the standard library only, as the holder has to stay small.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time

TYPE_CHECKING = False  # without loading `typing`
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Protocol

    class Listener(Protocol):
        """Who is told what happens."""

        def signalled(self, number: int) -> None:
            """A signal has arrived."""

        def heard(self, server: Server, verb: str, rest: str, fd: int | None) -> None:
            """A server has sent a message. `fd`: a descriptor that came with it, which is the listener's now."""

        def ended(self, server: Server, code: int) -> None:
            """A server process has ended, with this exit code; negative for a signal."""


MESSAGE_BYTES = 1 << 16
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
HEEDED = (*STOPPING, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD)

_OOM_SCORE = "/proc/self/oom_score_adj"
_UNKILLABLE = "-1000"
_ALL = [number for number in signal.valid_signals() if number not in (signal.SIGKILL, signal.SIGSTOP)]
_ESCAPES = ((b"\\040", b" "), (b"\\011", b"\t"), (b"\\012", b"\n"), (b"\\043", b"#"), (b"\\134", b"\\"))
_WAITS_FOR_FUSE = ("fuse_", "request_wait_answer")  # beginnings of the kernel functions in which a request waits


class Server:
    """A server process, and our end of the socket to it."""

    def __init__(self, pid: int, connection: socket.socket, now: float) -> None:
        self.pid = pid
        self.connection = connection
        self.ready = False  # it has loaded its program, and waits for its turn
        self.asked = False  # to hand the mount over
        self.serving = False
        self.beats = False  # it says that its event loop turns, until it serves; servers of old versions do not
        self.over = False  # it has ended the mount in order
        self.handed = False  # it has closed everything for its heir
        self.hung = False  # we have killed it because it did not answer
        self.said = ""  # why it has failed
        self.started_at = now
        self.heard_at = now
        self.dying_since: float | None = None
        self.overflow = -1  # the memory with what it could not send to us


class Machine:
    """The machine as one holder sees it. `options`: those of `holder.main`. `command`: starts a server."""

    def __init__(self, options: Mapping[str, str], command: Sequence[str]) -> None:
        self._options = options
        self._command = list(command)
        self._score = _read(_OOM_SCORE)
        self._servers: dict[int, Server] = {}  # that run, by pid
        self._wakeup, self._woken = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def become(self) -> None:
        """Make this process a holder: it heeds signals, and the out-of-memory killer passes it over if it may."""
        signal.set_wakeup_fd(self._woken, warn_on_full_buffer=False)
        for number in HEEDED:
            signal.signal(number, lambda *_: None)
        # `cli/holding.py` has blocked them, so that none was lost, or ended us, before there were handlers.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HEEDED)
        _write(_OOM_SCORE, _UNKILLABLE)
        _write("/proc/self/comm", "qedfs")  # for pidof(8) and killall(1), as without a holder

    @staticmethod
    def now() -> float:
        """CLOCK_MONOTONIC in seconds."""
        return time.monotonic()

    def adopt(self, pid: int, fd: int) -> Server:
        """The server that runs already as a child of this process. `fd`: our end of its socket."""
        connection = socket.socket(fileno=fd)
        connection.set_inheritable(False)
        connection.setblocking(False)
        server = self._known(pid, connection)
        self.send(server, "state")  # there are no values yet
        return server

    def start(self, state: str) -> Server:
        """Start another server. `state`: the format of the values that it would get. Raises OSError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            os.set_inheritable(theirs.fileno(), True)
            at = self._command.index("mount") + 1
            command = [*self._command[:at], f"--holder-fd={theirs.fileno()}", *self._command[at:]]
            _write(_OOM_SCORE, self._score)  # inherited
            # A process group of its own: Ctrl-C reaches only us, and we pass it on.
            pid = os.posix_spawn(command[0], command, os.environ, setpgroup=0, setsigdef=_ALL)
        except BaseException:
            ours.close()
            raise
        finally:
            _write(_OOM_SCORE, _UNKILLABLE)
            theirs.close()
        ours.setblocking(False)
        server = self._known(pid, ours)
        self.send(server, f"state {state}")
        return server

    def _known(self, pid: int, connection: socket.socket) -> Server:
        server = self._servers[pid] = Server(pid, connection, self.now())
        return server

    def wait(self, seconds: float, listener: Listener) -> None:
        """Tell what happens within this time, in order: the last words of a server come before its end."""
        poll = select.poll()
        poll.register(self._wakeup, select.POLLIN)
        for server in self._servers.values():
            if server.connection.fileno() >= 0:
                poll.register(server.connection, select.POLLIN)
        with contextlib.suppress(InterruptedError):
            poll.poll(1000 * seconds)
        for number in _drained(self._wakeup):
            listener.signalled(number)
        for server in tuple(self._servers.values()):
            _listen(server, listener)
        for server, code in self._ends():
            _listen(server, listener)
            server.connection.close()
            _catch_up(server, listener)
            listener.ended(server, code)

    def _ends(self) -> Iterator[tuple[Server, int]]:
        for server in tuple(self._servers.values()):
            pid, status = os.waitpid(server.pid, os.WNOHANG)
            if pid:
                del self._servers[pid]
                yield server, os.waitstatus_to_exitcode(status)

    @staticmethod
    def send(server: Server, text: str, *descriptors: int) -> None:
        """Send a message. A server that has died does not get it, and its end is noticed elsewhere."""
        with contextlib.suppress(OSError):
            socket.send_fds(server.connection, [text.encode()], list(descriptors))

    def pass_on(self, server: Server, mount_fd: int, told: Mapping[str, object], values: Mapping[str, str]) -> None:
        """Give a server the mount, and what an earlier one has said."""
        memory = os.memfd_create("qedfs-values")
        try:
            os.write(memory, _json(dict(values)).encode())
            self.send(server, f"take {_json(dict(told))}", mount_fd, memory)
        finally:
            os.close(memory)

    @staticmethod
    def kill(server: Server, number: int) -> None:
        """Send a signal to a server."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(server.pid, number)

    @staticmethod
    def lingers_for(server: Server) -> str:
        """What a killed server waits for, whose main thread has ended and others have not; "" if it is not so.

        "mount": one of its threads waits for our mount. "disk": for something else, such as an fdatasync. "unknown":
        the kernel does not tell.
        """
        folder = f"/proc/{server.pid}"
        if not _read(f"{folder}/stat").rpartition(") ")[2].startswith("Z"):
            return ""
        try:
            threads = [thread for thread in os.listdir(f"{folder}/task") if thread != str(server.pid)]
        except OSError:
            return ""
        places = [_read(f"{folder}/task/{thread}/wchan") for thread in threads]
        if any(place.startswith(_WAITS_FOR_FUSE) for place in places):
            return "mount"
        return "disk" if any(place not in ("", "0") for place in places) else "unknown"

    def take_away(self, mount_fd: int, device: str) -> None:
        """End the mount without a server: whoever waits for it gets an error."""
        os.close(mount_fd)
        _unmount(self._options["mountpoint"], device)

    @staticmethod
    def notify(text: str) -> None:
        """Pass a server's message on to the service manager, which believes its main process only."""
        address = os.environ.get("NOTIFY_SOCKET", "")
        if not address.startswith(("/", "@")):
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.settimeout(0.5)
            sender.sendto(text.encode(), f"\0{address[1:]}" if address.startswith("@") else address)

    def log(self, text: str, level: str) -> None:
        """Write a line to the log of the mount. `level`: "warning" or "error"."""
        if self._options["log"] == "json":
            line = _json({"time": round(time.time(), 6), "level": level, "logger": "holder", "message": text})
        elif self._options["log"] == "journal":
            line = f"<{4 if level == 'warning' else 3}>{level.upper()} {text}"
        else:
            line = f"{time.strftime('%Y-%m-%d %H:%M:%S')},000 {level.upper()} {text}"
        with contextlib.suppress(OSError):
            os.write(2, f"{line}\n".encode(errors="backslashreplace"))


def watchdog_seconds() -> float | None:
    """The service manager's watchdog time in seconds; None if it does not watch us. Our servers report to us."""
    watched = os.environ.pop("WATCHDOG_PID", str(os.getpid()))
    try:
        microseconds = int(os.environ.get("WATCHDOG_USEC", "0"))
    except ValueError:
        return None
    if watched != str(os.getpid()):
        os.environ.pop("WATCHDOG_USEC", None)
        return None
    return microseconds / 1e6 if microseconds > 0 else None


def _listen(server: Server, listener: Listener) -> None:
    """Tell what a server has sent."""
    while server.connection.fileno() >= 0:
        try:
            content, descriptors, _, _ = socket.recv_fds(server.connection, MESSAGE_BYTES, 1)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            content, descriptors = b"", []
        if not content:
            server.connection.close()  # SIGCHLD follows
            return
        for fd in descriptors:
            os.set_inheritable(fd, False)
        verb, _, rest = content.decode(errors="surrogateescape").partition(" ")
        if verb == "ready" and descriptors:
            server.overflow = descriptors.pop()
        listener.heard(server, verb, rest, descriptors[0] if descriptors else None)


def _catch_up(server: Server, listener: Listener) -> None:
    """Tell what a server that has ended could not send, because we did not read."""
    if server.overflow < 0:
        return
    with open(server.overflow, "rb") as memory:  # at the writer's offset
        memory.seek(0)
        # Without a line that a kill has cut.
        lines = memory.read().rpartition(b"\n")[0].decode(errors="surrogateescape").split("\n")
    server.overflow = -1
    for line in filter(None, lines):
        verb, _, rest = line.partition(" ")
        listener.heard(server, verb, rest, None)


def _drained(fd: int) -> bytes:
    with contextlib.suppress(BlockingIOError, InterruptedError):
        return os.read(fd, 4096)
    return b""


def _json(value: object) -> str:
    """A mapping of texts to texts, numbers and such mappings as JSON.

    Not by the module of that name: it is a quarter of what a holder would load, and if it is loaded only when it is
    needed, an upgrade of the machine may have removed the Python that this process runs.
    """
    if isinstance(value, str):
        if value.isascii() and value.isprintable() and '"' not in value and "\\" not in value:
            return f'"{value}"'
        return '"' + "".join(_escaped(ord(one)) for one in value) + '"'
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_json(key)}: {_json(one)}" for key, one in value.items()) + "}"
    return repr(value)


def _escaped(code: int) -> str:
    """A character as JSON writes it: in one or two units of UTF-16."""
    if code > 0xFFFF:
        return _escaped(0xD800 + (code - 0x10000 >> 10)) + _escaped(0xDC00 + (code & 0x3FF))
    return f"\\u{code:04x}"


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""


def _write(path: str, text: str) -> None:
    """Write a setting, if we may: a lower score needs CAP_SYS_RESOURCE."""
    with contextlib.suppress(OSError), open(path, "w") as file:
        file.write(text)


def _unmount(mountpoint: str, device: str) -> None:
    """Take a dead mount away, unless another file system is mounted at the path."""
    found = ""
    with open("/proc/self/mountinfo", "rb") as table:
        for line in table:
            fields = line.split(b" ")
            place = fields[4]
            for code, byte in _ESCAPES:
                place = place.replace(code, byte)
            if place == os.fsencode(mountpoint):
                found = fields[2].decode()
    if not found or found != device:
        return
    # A dying server may still have the connection open. fuse(4): the file belongs to the user who has mounted.
    _write(f"/sys/fs/fuse/connections/{device.partition(':')[2]}/abort", "1")
    words = ["umount", "-c", "-l"] if os.getuid() == 0 else ["fusermount3", "-u", "-z"]
    with contextlib.suppress(OSError):
        os.waitpid(os.posix_spawnp(words[0], [*words, "--", mountpoint], os.environ), 0)
