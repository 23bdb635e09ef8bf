"""As much of systemd as our units need, for machines that were not booted with it: `systemctl start|stop UNIT`.

It reads the real unit files, and runs their commands with the environment, the readiness protocol and the order that
systemd.service(5) tells. Of what confines a service, capabilities are taken away; system calls are not.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shlex
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.service.support import listener

INSTALLED = "/usr/local/bin/qedfs"
CONFIGURATION = "/etc/qedfs/"
STOP_SECONDS = 20.0


class Unit:
    """One unit: its settings with the instance filled in, each as often as it stands there."""

    def __init__(self, name: str, folder: Path) -> None:
        prefix, _, rest = name.partition("@")
        instance = rest.removesuffix(".service")
        self.name = name
        self.settings: dict[str, list[str]] = defaultdict(list)
        for line in (folder / f"{prefix}@.service").read_text().splitlines():
            key, equals, value = line.partition("=")
            if equals and not line.startswith(("#", ";")):
                self.settings[key].append(value.replace("%i", instance))

    def get(self, key: str) -> str:
        """A setting that stands once."""
        (value,) = self.settings[key]
        return value


class Manager:
    """The units of one folder. Everything it keeps is in `folder`, so that several processes can take turns."""

    def __init__(self, folder: Path) -> None:
        """`folder` holds units/, etc/ (the configuration), state/ and bin/ with qedfs and systemctl."""
        self.folder = folder

    def start(self, name: str) -> int:
        """Start a unit and what it requires; the exit code is 0 if it is started."""
        unit = Unit(name, self.folder / "units")
        if self.pid(name) is not None:
            return 0
        for required in unit.settings["Requires"] + unit.settings["BindsTo"]:
            if self.start(required):
                return 1
        environment = self._environment(unit)
        for command in unit.settings["ExecStartPre"]:
            if self._run(unit, command, environment):
                return 1
        if unit.get("Type") == "oneshot":
            return self._start_oneshot(unit, environment)
        return self._start_notify(unit, environment)

    def stop(self, name: str) -> int:
        """Stop a unit by SIGTERM and wait for its end."""
        unit = Unit(name, self.folder / "units")
        pid = self.pid(name)
        if pid is not None and not _terminated(pid):
            return 1
        self._pid_file(name).unlink(missing_ok=True)
        for command in unit.settings["ExecStopPost"]:
            self._run(unit, command, self._environment(unit))
        return 0

    def pid(self, name: str) -> int | None:
        """The main process of a unit that runs."""
        try:
            pid = int(self._pid_file(name).read_text())
            os.kill(pid, 0)
        except (FileNotFoundError, ProcessLookupError):
            return None
        return pid

    def _note_pid(self, name: str, pid: int) -> None:
        # Other processes look for it meanwhile: it is there with its text, or not at all.
        written = self.folder / f"{name}.pid"
        written.write_text(str(pid))
        written.replace(self._pid_file(name))

    def _start_oneshot(self, unit: Unit, environment: Mapping[str, str]) -> int:
        self._note_pid(unit.name, os.getpid())
        try:
            return next(
                (code for command in unit.settings["ExecStart"] if (code := self._run(unit, command, environment))), 0
            )
        finally:
            self._pid_file(unit.name).unlink(missing_ok=True)

    def _start_notify(self, unit: Unit, environment: Mapping[str, str]) -> int:
        with listener() as notified, (self.folder / "log").open("ab") as log:
            main = subprocess.Popen(
                [*confined(unit), *self._words(unit.get("ExecStart"), environment)],
                env={**environment, "NOTIFY_SOCKET": notified.address},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd="/",
            )
            while main.poll() is None:
                with contextlib.suppress(TimeoutError):
                    notified.wait_for("READY=1", seconds=0.2)
                    self._note_pid(unit.name, main.pid)
                    # It is meant to live on when we have ended.
                    main.returncode = 0
                    return 0
        return main.returncode

    def _run(self, unit: Unit, command: str, environment: Mapping[str, str]) -> int:
        may_fail = command.startswith("-")
        with (self.folder / "log").open("ab") as log:
            words = [*confined(unit), *self._words(command.removeprefix("-"), environment)]
            done = subprocess.run(words, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False)
        return 0 if may_fail else done.returncode

    def _environment(self, unit: Unit) -> dict[str, str]:
        path = unit.get("EnvironmentFile").replace(CONFIGURATION, f"{self.folder}/etc/")
        pairs = (line.partition("=") for line in Path(path).read_text().splitlines())
        # What systemd gives to a service, not what we have. PYTHONPATH stands for an installed qedfs.
        usual = {"PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONPATH": os.pathsep.join(sys.path)}
        return {**usual, **{key: value for key, _, value in pairs}}

    def _words(self, command: str, environment: Mapping[str, str]) -> list[str]:
        """A command line as systemd.service(5) splits it: ${NAME} is one word, $NAME as many as it holds."""
        words: list[str] = []
        for word in shlex.split(command):
            if re.fullmatch(r"\$\w+", word):
                words += environment.get(word[1:], "").split()
            else:
                words.append(re.sub(r"\$\{(\w+)\}", lambda found: environment.get(found[1], ""), word))
        words[0] = {INSTALLED: str(self.folder / "bin" / "qedfs")}.get(words[0], words[0])
        if words[0] == "/usr/bin/systemctl":
            words[0] = str(self.folder / "bin" / "systemctl")
        return words

    def _pid_file(self, name: str) -> Path:
        return self.folder / "state" / name


def confined(unit: Unit) -> list[str]:
    """What to put before a command so that it runs with the capabilities of the unit."""
    kept = [f"+{name.removeprefix('CAP_').lower()}" for name in unit.get("CapabilityBoundingSet").split()]
    words = ["setpriv", f"--bounding-set={','.join(['-all', *kept])}", "--inh-caps=-all"]
    return [*words, *(["--no-new-privs"] if unit.get("NoNewPrivileges") == "yes" else [])]


def _terminated(pid: int) -> bool:
    """SIGTERM; whether the process has ended in time."""
    try:
        process = os.pidfd_open(pid)
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        return True
    ended, _, _ = select.select([process], [], [], STOP_SECONDS)
    os.close(process)
    return bool(ended)


def main(folder: Path, arguments: Sequence[str]) -> int:
    """The command line; `folder` as for `Manager`."""
    manager = Manager(folder)
    verb, unit = arguments[0], arguments[-1]
    if "--no-block" in arguments:
        subprocess.Popen(
            [sys.executable, "-m", "tests.service.systemctl", str(folder), verb, unit],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ).returncode = 0
        return 0
    return {"start": manager.start, "stop": manager.stop}[verb](unit)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
