"""The holder of a mount: the process that keeps it while its server is replaced, after a crash or for an upgrade.

Owns the decisions: which server has the mount, which one gets it next, when another one is started, and how the mount
ends. A server that has not said that it has ended the mount in order has crashed, whatever its exit code: it leaves the
mount to the next one. After as many crashes in DEATH_SECONDS as the option allows, the holder gives up and takes the
mount away. Must not know what is served: what one server tells the next are keys and values to it. The other end of the
conversation is `held.py`, which has the table of messages; the processes themselves are in `holder_machine.py`.

It is the last process that the machine should lose, so it is small, allocates next to nothing while the mount serves,
and loads nothing but a few modules of the standard library. It is run by its path. Nor does it touch the mount: a
request to it would wait for a server that only this process can start.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import signal
import sys

TYPE_CHECKING = False  # without loading `typing`
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Protocol

    from qedfs.mount.holder_machine import Listener, Server

    class Port(Protocol):
        """What a holder needs of the machine. See `holder_machine.Machine`."""

        def now(self) -> float: ...
        def start(self, state: str) -> Server: ...
        def wait(self, seconds: float, listener: Listener) -> None: ...
        def send(self, server: Server, text: str) -> None: ...
        def pass_on(
            self, server: Server, mount_fd: int, told: Mapping[str, object], values: Mapping[str, str]
        ) -> None: ...
        def kill(self, server: Server, number: int) -> None: ...
        def lingers_for(self, server: Server) -> str: ...
        def take_away(self, mount_fd: int, device: str) -> None: ...
        def notify(self, text: str) -> None: ...
        def log(self, text: str, level: str) -> None: ...


DEATH_SECONDS = 60.0
WATCHDOG_PART = 0.75  # of the service manager's time: after it a silent server is replaced, before the manager acts
LOAD_SECONDS = 60.0  # for the next server to load its program
# For the threads of a killed server to end. One that waits for the mount never ends by itself. One that waits for a
# disk does, however slow that is, and the next server could not have the overlays before.
LINGER_SECONDS = {"mount": 10.0, "unknown": 120.0, "disk": math.inf}
LOOK_SECONDS = 5.0
HANG_SECONDS = 120.0  # for the event loop of a server that takes over to turn, however long the whole takes
STARTS_WITHIN = 5  # of these times: a server that takes over may need longer than one that serves, but not for ever

# A second signal ends all at once, but not if it is the first one again: timeout(1) signals its child, and then the
# group of it.
AGAIN_SECONDS = 0.5

# Why a mount has got another server: `qedfs_restarts_total` has these labels.
UPGRADE, KILLED, ERROR, HUNG = "upgrade", "killed", "error", "hung"

_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Holder:
    """The holder of one mount. `first`: the server that makes it. `most_deaths`: crashes in DEATH_SECONDS.

    `watchdog_seconds`: the service manager's, after which it ends a silent service; None if it does not watch.
    """

    def __init__(
        self, machine: Port, first: Server, mountpoint: str, *, most_deaths: int, watchdog_seconds: float | None = None
    ) -> None:
        self.result: int | None = None  # our exit code; negative for a signal
        self._machine = machine
        self._mountpoint = mountpoint
        self._most_deaths = most_deaths
        self._watchdog = watchdog_seconds
        self._server: Server | None = None  # which has the mount
        self._heir: Server | None = first  # which will get it
        self._kept = -1  # /dev/fuse
        self._values: dict[str, str] = {}  # what a server tells the next one
        self._deaths: list[float] = []
        self._served = False  # a server has answered requests
        self._reason = ""  # of the last change of servers
        self._restarts: dict[str, int] = {}  # by kind
        self._since = 0.0  # when the last server ended
        self._stop = 0  # the signal that has told us to end the mount
        self._stopped_at = 0.0  # when it came

    def run(self) -> int:
        """Hold the mount until it has ended. Returns the exit code of its last server; negative for a signal."""
        while self.result is None:
            self._machine.wait(min(LOOK_SECONDS, (self._watchdog or math.inf) / 4), self)
            self.look()
        return self.result

    def look(self) -> None:
        """Deal with what has not happened in time."""
        if self.result is None and self._kept >= 0:
            self._look_for_loading()
            self._look_for_lingering()
            self._look_for_hanging()
            self._look_after_watchdog()

    # Messages: the table is in `held.py`.

    def heard(self, server: Server, verb: str, rest: str, fd: int | None) -> None:
        """A server has sent a message, and a descriptor, if the message has one."""
        server.heard_at = self._machine.now()
        key, _, value = rest.partition(" ")
        if verb == "keep" and fd is not None:
            self._kept, fd = fd, None
        elif verb == "set":
            self._values[key] = value
        elif verb == "del":
            self._values.pop(key, None)
        elif verb == "alive":
            server.beats = True
        elif verb == "notify":
            self._machine.notify(rest)
        else:
            self._heard_event(server, verb, rest)
        if fd is not None:
            os.close(fd)

    def _heard_event(self, server: Server, verb: str, rest: str) -> None:
        if verb == "ready":
            server.ready = True
            self._pass_on()
        elif verb == "serving":
            server.serving = self._served = True
            if self._stop:
                self._machine.kill(server, self._stop)
        elif verb == "upgrade":
            self._upgrade()
        elif verb == "failed":
            server.said = rest
        elif verb == "over":
            server.over = True
        elif verb == "handed":
            server.handed = True

    def _pass_on(self) -> None:
        """Give the mount to an heir that is ready, if nobody has it; or ask who has it to give it up."""
        heir, server = self._heir, self._server
        if heir is None or not heir.ready:
            return
        if server is not None:
            if not self._stop and not server.asked:
                server.asked = True
                self._machine.send(server, "hand")
            return
        self._server, self._heir = heir, None
        if self._kept < 0:
            self._machine.send(heir, "mount")
            return
        told = {
            "reason": self._reason,
            "restarts": sum(self._restarts.values()),
            "kinds": self._restarts,
            "since": self._since,
        }
        self._machine.pass_on(heir, self._kept, told, self._values)

    def _started(self) -> Server:
        """Another server, which may be of another version than the last one. Raises OSError."""
        return self._machine.start(self._values.get("format", ""))

    def _upgrade(self) -> None:
        if self._heir is not None or self._server is None or self._stop:
            return
        try:
            self._heir = self._started()
        except OSError as exc:
            self._machine.send(self._server, f"failed {exc.strerror}")

    # Ends of servers.

    def ended(self, server: Server, code: int) -> None:
        """A server process has ended."""
        if self.result is not None:  # we have killed it
            return
        if server is self._heir and self._server is not None:
            self._heir = None
            self._machine.send(self._server, f"failed {server.said or _how(code)}")
            return
        if server is self._heir:
            self._heir = None
        elif server is self._server:
            self._server = None
        else:
            return
        if server.over or self._kept < 0:
            self.result = code
        elif not self._served:
            self._give_up(f"its server was ended by {_how(code)} before it served", code)
        elif server.handed:
            self._since = self._machine.now()
            self._replace(UPGRADE, "an upgrade")
        else:
            self._died(server, code)

    def _died(self, server: Server, code: int) -> None:
        now = self._machine.now()
        if server.serving or not self._since:
            self._since = now  # otherwise nobody has served since the last death
        # A server that dies before it serves counts however long that takes, or its users could wait for ever.
        self._deaths = [at for at in self._deaths if at > now - DEATH_SECONDS or at >= self._since] + [now]
        how = f"{_how(code)}{f' ({server.said})' if server.said else ''}"
        if "resend" not in self._values:
            # Whoever waits for the dead server would wait for ever: the next one does not get these requests.
            self._give_up(f"its server was ended by {how}, and this kernel does not repeat requests (Linux 6.9 does)")
        elif len(self._deaths) >= self._most_deaths:
            when = "times within a minute, the last time by"
            if self._deaths[0] <= now - DEATH_SECONDS:
                when = "times without serving in between, the last time by"
            self._give_up(f"its server has died {len(self._deaths)} {when} {how}")
        else:
            self._machine.log(f"the server (pid {server.pid}) was ended by {how}; another one takes over", "warning")
            self._replace(HUNG if server.hung else KILLED if code < 0 else ERROR, how)

    def _replace(self, kind: str, reason: str) -> None:
        """Let another server take the mount over, which nobody has."""
        self._reason = reason
        self._restarts[kind] = self._restarts.get(kind, 0) + 1
        if self._heir is None:
            try:
                self._heir = self._started()
            except OSError as exc:
                self._give_up(f"its server was ended by {reason}, and no other one can be started: {exc.strerror}")
                return
        self._pass_on()

    def _give_up(self, why: str, code: int = 1) -> None:
        self._machine.log(f"{self._mountpoint}: {why}; the mount is taken away", "error")
        self._kill_all()
        self.result = code or 1

    def _kill_all(self) -> None:
        for one in (self._server, self._heir):
            if one is not None:
                self._machine.kill(one, signal.SIGKILL)
        if self._kept >= 0:
            self._machine.take_away(self._kept, self._values.get("device", ""))

    # Signals.

    def signalled(self, number: int) -> None:
        """A signal has arrived."""
        if number == signal.SIGUSR2:
            self._upgrade()
        elif number == signal.SIGUSR1 and self._server is not None:
            self._machine.kill(self._server, number)
        elif number in _STOPPING and self._stop:
            if self._machine.now() - self._stopped_at < AGAIN_SECONDS:
                return
            # The second one ends everything at once, also if the event loop of the server hangs.
            self._kill_all()
            self.result = -number
        elif number in _STOPPING:
            self._stop, self._stopped_at = number, self._machine.now()
            self._pass_stop_on()

    def _pass_stop_on(self) -> None:
        """Tell a server to end the mount, unless one takes over: that would end at once, so it is told when it serves.

        After a crash, and while the mount is handed over, only the next server can end it in order.
        """
        server, heir = self._server, self._heir
        if server is None:
            if heir is not None and self._kept < 0:
                self._machine.kill(heir, self._stop)
        elif not server.asked:
            if heir is not None:
                self._machine.kill(heir, signal.SIGKILL)
            if server.serving or not self._served:
                self._machine.kill(server, self._stop)

    # What has not happened in time.

    def _look_for_loading(self) -> None:
        """Replace a next server that does not get ready."""
        heir = self._heir
        if heir is None or heir.ready or heir.hung or self._machine.now() - heir.started_at < LOAD_SECONDS:
            return
        heir.hung, heir.said = True, f"it has loaded for longer than {LOAD_SECONDS:.0f} s"
        self._machine.kill(heir, signal.SIGKILL)

    def _look_for_lingering(self) -> None:
        """Give up if a killed server does not end, because one of its threads waits for the mount.

        No server should have such a thread. Only the end of the connection frees it.
        """
        server = self._server
        if server is None or not (waits_for := self._machine.lingers_for(server)):
            return
        now = self._machine.now()
        if server.dying_since is None:
            server.dying_since = now
            if waits_for == "disk":
                text = f"the server (pid {server.pid}) was killed, and waits for a disk; then another one takes over"
                self._machine.log(text, "warning")
        if now - server.dying_since > LINGER_SECONDS[waits_for]:
            self._give_up(f"its server (pid {server.pid}) was killed, but one of its threads waits for the mount")

    def _look_for_hanging(self) -> None:
        """Replace a server whose event loop hangs before it serves. Opening the overlays may take as long as it takes.

        One that serves may be stopped by a user who looks at it. Only a service manager's watchdog tells us to end it.
        """
        server = self._server
        if server is None or server.serving or server.hung or not server.beats:
            return
        silence = self._machine.now() - server.heard_at
        if silence > HANG_SECONDS:
            self._machine.log(f"the server (pid {server.pid}) hangs: nothing was heard for {silence:.0f} s", "error")
            server.hung = True
            self._machine.kill(server, signal.SIGKILL)

    def _look_after_watchdog(self) -> None:
        """Replace a server that hangs, and keep the service manager from doing worse to all of us."""
        server = self._server or self._heir
        if self._watchdog is None or server is None:
            return
        silence = self._machine.now() - server.heard_at
        most = self._watchdog * (WATCHDOG_PART if server.serving else STARTS_WITHIN)
        if silence > most:
            self._machine.log(f"the server (pid {server.pid}) has been silent for {silence:.0f} s", "error")
            server.hung = True
            self._machine.kill(server, signal.SIGKILL)
            server.heard_at = self._machine.now()
        if silence > most or not server.serving:
            self._machine.notify("WATCHDOG=1")


def _how(code: int) -> str:
    """The end of a process in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _lock(folder: str) -> int:
    """Hold the runtime folder, as servers do (`host/runtime.py`): between two of them it must not be removed."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_SH)
    return fd


def _tidy_up(folder: str, lock: int) -> None:
    """Remove the runtime folder of a mount that has ended well, which we have kept from others until now."""
    with contextlib.suppress(Exception):  # what it needs is loaded only now, and may not be there any more
        from pathlib import Path

        from qedfs.host.runtime import remove_unless_served

        remove_unless_served(Path(folder), lock)


def main(arguments: list[str]) -> int:
    """Run `holder.py --KEY=VALUE... -- COMMAND...`. Returns the exit code; negative for a signal."""
    at = arguments.index("--")
    options = dict(word.removeprefix("--").split("=", 1) for word in arguments[:at])
    sys.path.append(options["package"])  # last, so that it hides no module of the standard library
    from qedfs.mount.holder_machine import Machine, watchdog_seconds

    machine = Machine(options, arguments[at + 1 :])
    machine.become()
    lock = _lock(options["folder"])
    code = Holder(
        machine,
        machine.adopt(int(options["first-pid"]), int(options["first-fd"])),
        options["mountpoint"],
        most_deaths=int(options["most-deaths"]),
        watchdog_seconds=watchdog_seconds(),
    ).run()
    if code == 0:
        _tidy_up(options["folder"], lock)
    os.close(lock)
    return code


if __name__ == "__main__":
    result = main(sys.argv[1:])
    if result < 0:  # end as the server has
        signal.signal(-result, signal.SIG_DFL) if -result not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -result)
    sys.exit(result if result >= 0 else 128 - result)  # a process with number 1 is not ended by its own signals
