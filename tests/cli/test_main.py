"""What a command imports: its processor time is mostly that of its imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.hang import HANG_SECONDS
from tests.harness.mounts import qedfs

from .support import daemon

# Each of them takes as long to import as Python takes to start, or longer.
HEAVY = {
    "trio",
    "pycurl",
    "pyfuse3",
    "rich",
    "logging",
    "asyncio",
    "ssl",
    "attr",
    "qedfs.overlay.open",
    "qedfs.image.image",
}

# Run the command, then print what was imported to a file.
PROGRAM = """
import sys
from pathlib import Path
from qedfs.cli.main import main
try:
    main(sys.argv[2:])
finally:
    Path(sys.argv[1]).write_text("\\n".join(sys.modules))
"""

# Print whether garbage is collected when the command's module is loaded, and in the end.
COLLECTING = """
import gc, sys
from qedfs.cli.entry import main
class Finder:
    def find_spec(self, name, path, target=None):
        if name.startswith("qedfs.cli.commands."):
            print("loaded with", gc.isenabled())
sys.meta_path.insert(0, Finder())
try:
    main()
finally:
    print(f"ended with {gc.isenabled()}, frozen: {gc.get_freeze_count() > 0}")
"""


def imported(tmp_path: Path, *words: str | Path) -> set[str]:
    """The modules that a command has imported at its end."""
    listing = tmp_path / "modules"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, listing, *words],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    return set(listing.read_text().split())


@pytest.mark.parametrize("words", [("--version",), ("umount", "--if-mounted", "/nothing/there")])
def test_a_command_imports_what_it_needs(tmp_path: Path, words: tuple[str, ...]) -> None:
    found = imported(tmp_path, *words)
    assert found & HEAVY == set()
    assert {name for name in found if name.startswith("qedfs.cli.commands.")} <= {f"qedfs.cli.commands.{words[0]}"}


def test_commands_on_a_mount_import_neither_its_libraries_nor_trio(tmp_path: Path) -> None:
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    qedfs("create", tmp_path / "disk.qed", "--size", "1M")
    with daemon(tmp_path / "disk.qed", mountpoint):
        for words in (("status",), ("status", "--json"), ("wait",), ("umount",)):
            assert imported(tmp_path, words[0], mountpoint, *words[1:]) & HEAVY == set(), words


def test_the_process_that_starts_a_daemon_imports_nothing_that_serves(tmp_path: Path) -> None:
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    qedfs("create", tmp_path / "disk.qed", "--size", "1M")
    try:
        found = imported(tmp_path, "mount", tmp_path / "disk.qed", mountpoint, "--daemon", "--stream-delay", "1s")
    finally:
        qedfs("umount", mountpoint, "--if-mounted")
    assert found & HEAVY == set()
    assert "qedfs.mount.server" not in found


def test_a_mount_without_a_terminal_does_not_import_what_draws_bars(tmp_path: Path) -> None:
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    qedfs("create", tmp_path / "disk.qed", "--size", "1M")
    found = imported(tmp_path, "mount", tmp_path / "disk.qed", mountpoint, "--until-streamed")
    assert "qedfs.mount.server" in found
    assert "rich" not in found


def test_garbage_is_collected_from_the_start_of_the_command_on() -> None:
    """Before it, collections among the modules would find nothing; without them, a wait would grow."""
    done = subprocess.run(
        [sys.executable, "-c", COLLECTING, "umount", "--if-mounted", "/nothing/there"],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    assert (done.stderr, done.stdout) == ("", "loaded with False\nended with True, frozen: True\n")


def test_the_help_names_every_command() -> None:
    shown = qedfs("--help").stdout
    names = (
        "check",
        "create",
        "doctor",
        "export",
        "info",
        "map",
        "mount",
        "profile",
        "status",
        "stream",
        "umount",
        "wait",
    )
    assert all(f"\n  {name} " in shown for name in names)
