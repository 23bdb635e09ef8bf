"""The holder of a mount: the process that keeps it while its server is replaced, after a crash or for an upgrade.

Owns the descriptor of /dev/fuse between two servers, the start of servers, and the decision to start another one. A
server that dies by a signal leaves its mount to the next one; one that ends in order ends the mount. After as many
deaths in DEATH_SECONDS as the option allows, the holder gives up and takes the mount away. Must not know what is
served: what one server tells the next are keys and values to it. The other end of the conversation is `held.py`, which
has the table of messages.

It is the last process that the machine should lose, so it is small, allocates next to nothing while the mount serves,
and loads nothing but a few modules of the standard library. It is run by its path, not as a part of the package. Nor
does it touch the mount: a request to it would wait for a server that only this process can start.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import select
import signal
import socket
import sys
import time

DEATH_SECONDS = 60.0
MESSAGE_BYTES = 1 << 16
WATCHDOG_PART = 0.75  # of the service manager's time: after it a silent server is replaced, before the manager acts
STUCK_SECONDS = 10.0  # for the threads of a killed server to end
LOOK_SECONDS = 5.0
STARTS_WITHIN = 5  # of these times: a server that takes over may need longer than one that serves, but not for ever

_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_OOM_SCORE = "/proc/self/oom_score_adj"
_UNKILLABLE = "-1000"


class Server:
    """A server process, and our end of the socket to it."""

    def __init__(self, pid: int, connection: socket.socket) -> None:
        self.pid = pid
        self.connection = connection
        self.ready = False  # it has loaded its program, and waits for its turn
        self.serving = False
        self.over = False  # it has ended the mount in order
        self.handed = False  # it has closed everything for its heir
        self.said = ""  # why it has failed
        self.heard_at = time.monotonic()
        self.dying_since = 0.0

    def send(self, text: str, *descriptors: int) -> None:
        """Send a message. A server that has died does not get it, and its end is noticed elsewhere."""
        with contextlib.suppress(OSError):
            socket.send_fds(self.connection, [text.encode()], list(descriptors))


class Holder:
    """The holder of one mount. `options`: those of `main`. `command`: what starts a server, `... mount ...`."""

    def __init__(self, options: dict[str, str], command: list[str]) -> None:
        self._options = options
        self._command = command
        self._server: Server | None = None  # which has the mount
        self._heir: Server | None = None  # which will get it
        self._kept = -1  # /dev/fuse
        self._values: dict[str, str] = {}  # what a server tells the next one
        self._deaths: list[float] = []
        self._served = False  # a server has answered requests
        self._reason = ""  # of the last change of servers
        self._restarts = 0
        self._since = 0.0  # when the last server ended
        self._stop = 0  # the signal that has told us to end the mount
        self._result: int | None = None  # our exit code; negative for a signal
        self._score = _read(_OOM_SCORE)
        self._watchdog = _watchdog_seconds()

    def run(self) -> int:
        """Hold the mount until it has ended. Returns the exit code of its last server; negative for a signal."""
        wakeup, end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(end, warn_on_full_buffer=False)
        for heeded in (*_STOPPING, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD):
            signal.signal(heeded, lambda *_: None)
        self._heir = self._started(first=True)
        while self._result is None:
            poll = select.poll()
            poll.register(wakeup, select.POLLIN)
            for server in (self._server, self._heir):
                if server is not None and server.connection.fileno() >= 0:
                    poll.register(server.connection, select.POLLIN)
            with contextlib.suppress(InterruptedError):
                poll.poll(1000 * min(LOOK_SECONDS, (self._watchdog or math.inf) / 4))
            for number in _drained(wakeup):
                self._signal(number)
            for server in (self._server, self._heir):
                if server is not None:
                    self._listen(server)
            self._reap()
            self._look_for_stuck()
            self._look_after_watchdog()
        return self._result

    # Servers.

    def _started(self, *, first: bool = False) -> Server:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        words = [f"--holder-fd={theirs.fileno()}"]
        inherited = [theirs.fileno()]
        ready_fd = int(self._options["ready-fd"])
        if first and ready_fd >= 0:
            words.append(f"--ready-fd={ready_fd}")
            inherited.append(ready_fd)
        for fd in inherited:
            os.set_inheritable(fd, True)
        _write(_OOM_SCORE, self._score)  # inherited
        # A process group of its own: Ctrl-C reaches only us, and a second signal to the server would end it at once.
        at = self._command.index("mount") + 1
        command = [*self._command[:at], *words, *self._command[at:]]
        pid = os.posix_spawn(command[0], command, os.environ, setpgroup=0, setsigdef=_ALL)
        _write(_OOM_SCORE, _UNKILLABLE)
        theirs.close()
        if first and ready_fd >= 0:
            os.close(ready_fd)  # or who waits there would not notice the end of the server
        ours.setblocking(False)
        return Server(pid, ours)

    def _listen(self, server: Server) -> None:
        """Read what a server has sent."""
        while True:
            try:
                content, descriptors, _, _ = socket.recv_fds(server.connection, MESSAGE_BYTES, 1)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                content, descriptors = b"", []
            if not content:
                server.connection.close()  # SIGCHLD follows
                return
            verb, _, rest = content.decode(errors="surrogateescape").partition(" ")
            self._heed(server, verb, rest, descriptors)

    def _heed(self, server: Server, verb: str, rest: str, descriptors: list[int]) -> None:
        """Do what a message says: the table is in `held.py`."""
        server.heard_at = time.monotonic()
        key, _, value = rest.partition(" ")
        if verb == "keep" and descriptors:
            self._kept, descriptors = descriptors[0], []
            os.set_inheritable(self._kept, False)
        elif verb == "set":
            self._values[key] = value
        elif verb == "del":
            self._values.pop(key, None)
        elif verb == "notify":
            _notify(rest)
        else:
            self._heed_event(server, verb, rest)
        for fd in descriptors:
            os.close(fd)

    def _heed_event(self, server: Server, verb: str, rest: str) -> None:
        if verb == "ready":
            server.ready = True
            self._pass_on()
        elif verb == "serving":
            server.serving = self._served = True
            if self._stop:
                _kill(server.pid, self._stop)
        elif verb == "upgrade":
            self._upgrade()
        elif verb == "failed":
            server.said = rest
        elif verb == "over":
            server.over = True
        elif verb == "handed":
            server.handed = True

    def _pass_on(self) -> None:
        """Give the mount to a heir that is ready, if nobody has it; or ask who has it to give it up."""
        heir = self._heir
        if heir is None or not heir.ready:
            return
        if self._server is not None:
            self._server.send("hand")
            return
        self._server, self._heir = heir, None
        if self._kept < 0:
            heir.send("mount")
            return
        self._restarts += 1
        told = {"reason": self._reason, "restarts": self._restarts, "since": self._since}
        values = os.memfd_create("qedfs-values")
        os.write(values, json.dumps(self._values).encode(errors="surrogateescape"))
        heir.send(f"take {json.dumps(told)}", self._kept, values)
        os.close(values)

    def _upgrade(self) -> None:
        if self._heir is None and not self._stop:
            self._heir = self._started()

    # Ends.

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            for server in (self._server, self._heir):
                if server is not None and server.pid == pid:
                    if server.connection.fileno() >= 0:
                        self._listen(server)  # its last words
                    server.connection.close()
                    self._ended(server, os.waitstatus_to_exitcode(status))

    def _ended(self, server: Server, code: int) -> None:
        if server is self._heir and self._server is not None:
            self._heir = None
            self._server.send(f"failed {server.said or _how(code)}")
            return
        if server is self._heir:
            self._heir = None
        else:
            self._server = None
        if server.over or self._kept < 0:
            self._result = code
        elif not self._served:
            self._give_up(f"its server was ended by {_how(code)} before it served", code)
        elif server.handed:
            self._reason, self._since = "an upgrade", time.monotonic()
            self._heir = self._heir or self._started()
            self._pass_on()
        elif self._stop:
            self._give_up(f"its server was ended by {_how(code)} while it was closing", code)
        else:
            self._died(server, code)

    def _died(self, server: Server, code: int) -> None:
        now = time.monotonic()
        if server.serving or not self._since:
            self._since = now  # otherwise nobody has served since the last death
        self._deaths = [at for at in self._deaths if at > now - DEATH_SECONDS] + [now]
        how = f"{_how(code)}{f' ({server.said})' if server.said else ''}"
        if "resend" not in self._values:
            # Whoever waits for the dead server would wait for ever: the next one does not get these requests.
            self._give_up(
                f"its server was ended by {how}, and this kernel does not repeat requests (Linux 6.9 does)", 1
            )
            return
        if len(self._deaths) >= int(self._options["most-deaths"]):
            self._give_up(f"its server has died {len(self._deaths)} times within a minute, the last time by {how}", 1)
            return
        self._reason = how
        self._log(f"the server (pid {server.pid}) was ended by {how}; another one takes over", "warning")
        self._heir = self._heir or self._started()
        self._pass_on()

    def _give_up(self, why: str, code: int) -> None:
        self._log(f"{self._options['mountpoint']}: {why}; the mount is taken away", "error")
        if self._heir is not None:
            _kill(self._heir.pid, signal.SIGKILL)
        os.close(self._kept)  # cuts the connection: whoever waits gets an error
        _unmount(self._options["mountpoint"], self._values.get("device", ""))
        self._result = code or 1

    def _signal(self, number: int) -> None:
        server = self._server
        if number == signal.SIGUSR2:
            self._upgrade()
        elif number == signal.SIGUSR1 and server is not None:
            _kill(server.pid, number)
        elif number in _STOPPING and self._stop:
            # The second one ends everything at once, also if the event loop of the server hangs.
            for one in (server, self._heir):
                if one is not None:
                    _kill(one.pid, signal.SIGKILL)
            self._result = -number
        elif number in _STOPPING:
            self._stop = number
            if self._heir is not None and server is not None:
                _kill(self._heir.pid, signal.SIGKILL)
            # A server that is taking over would end at once. It is told when it serves, so that it ends in order.
            if server is not None and (server.serving or not self._served):
                _kill(server.pid, number)
            elif self._heir is not None and self._kept < 0:
                _kill(self._heir.pid, number)

    def _look_for_stuck(self) -> None:
        """Give up if a killed server does not end, because one of its threads waits for the mount.

        No server should have such a thread. Only the end of the connection frees it.
        """
        server = self._server
        if server is None or self._kept < 0 or not _is_dying(server.pid):
            return
        server.dying_since = server.dying_since or time.monotonic()
        if time.monotonic() - server.dying_since > STUCK_SECONDS:
            self._give_up(f"its server (pid {server.pid}) was killed, but one of its threads waits for the mount", 1)

    # The service manager.

    def _look_after_watchdog(self) -> None:
        """Replace a server that hangs, and keep the service manager from doing worse to all of us."""
        server = self._server or self._heir
        if self._watchdog is None or server is None or self._kept < 0:
            return
        silence = time.monotonic() - server.heard_at
        most = self._watchdog * (WATCHDOG_PART if server.serving else STARTS_WITHIN)
        if silence > most:
            self._log(f"the server (pid {server.pid}) has been silent for {silence:.0f} s", "error")
            _kill(server.pid, signal.SIGKILL)
            server.heard_at = time.monotonic()
        if silence > most or not server.serving:
            _notify("WATCHDOG=1")

    def _log(self, text: str, level: str) -> None:
        if self._options["log"] == "json":
            line = json.dumps({"time": round(time.time(), 6), "level": level, "logger": "holder", "message": text})
        elif self._options["log"] == "journal":
            line = f"<{4 if level == 'warning' else 3}>{level.upper()} {text}"
        else:
            line = f"{time.strftime('%Y-%m-%d %H:%M:%S')},000 {level.upper()} {text}"
        with contextlib.suppress(OSError):
            os.write(2, f"{line}\n".encode(errors="backslashreplace"))


_ALL = [number for number in signal.valid_signals() if number not in (signal.SIGKILL, signal.SIGSTOP)]


def _how(code: int) -> str:
    """The end of a process in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _drained(fd: int) -> bytes:
    with contextlib.suppress(BlockingIOError, InterruptedError):
        return os.read(fd, 4096)
    return b""


def _kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _is_dying(pid: int) -> bool:
    """Whether the main thread of a process has ended, and others have not."""
    return _read(f"/proc/{pid}/stat").rpartition(") ")[2].startswith("Z")


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


def _notify(text: str) -> None:
    """Pass a server's message on to the service manager, which believes its main process only."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.settimeout(0.5)
        sender.sendto(text.encode(), f"\0{address[1:]}" if address.startswith("@") else address)


def _watchdog_seconds() -> float | None:
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


def _unmount(mountpoint: str, device: str) -> None:
    """Take a dead mount away, unless another file system is mounted at the path."""
    found = ""
    with open("/proc/self/mountinfo", "rb") as table:
        for line in table:
            fields = line.split(b" ")
            place = fields[4]
            for code, byte in (
                (b"\\040", b" "),
                (b"\\011", b"\t"),
                (b"\\012", b"\n"),
                (b"\\043", b"#"),
                (b"\\134", b"\\"),
            ):
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


def _lock(folder: str) -> int:
    """Hold the runtime folder, as servers do (`host/runtime.py`): between two of them it must not be removed."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_SH)
    return fd


def _tidy_up(options: dict[str, str]) -> None:
    """Remove the runtime folder of a mount that has ended well, which we have kept from others until now."""
    with contextlib.suppress(Exception):  # what it needs is loaded only now, and may not be there any more
        sys.path.insert(0, options["package"])
        from pathlib import Path

        from qedfs.host.runtime import remove_unless_served

        remove_unless_served(Path(options["folder"]))


def main(arguments: list[str]) -> int:
    """Run `holder.py --KEY=VALUE... -- COMMAND...`. Returns the exit code; negative for a signal."""
    at = arguments.index("--")
    options = dict(word.removeprefix("--").split("=", 1) for word in arguments[:at])
    lock = _lock(options["folder"])
    code = Holder(options, arguments[at + 1 :]).run()
    os.close(lock)
    if code == 0:
        _tidy_up(options)
    return code


if __name__ == "__main__":
    result = main(sys.argv[1:])
    if result < 0:  # end as the server has
        signal.signal(-result, signal.SIG_DFL) if -result not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -result)
    sys.exit(result)
