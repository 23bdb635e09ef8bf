"""contrib/setup where it is no Debian: what it says there. On Debian every run of the tests begins with it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.harness.hang import HANG_SECONDS
from tests.harness.require import require

from .machine import CONTRIB

# Package managers that own one package, themselves.
MANAGERS = {
    "fedora": {"rpm": '[ "$2" = rpm ]', "dnf": "true"},
    "suse": {"rpm": '[ "$2" = rpm ]', "dnf": "true", "zypper": "true"},
    "arch": {"pacman": '[ "$2" = pacman ]'},
    "unknown": {},
}
DEBIAN_NAMES = {"libfuse3-dev", "qemu-utils", "busybox-static", "gnutls-bin", "libnbd-bin"}


def run(folder: Path, programs: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    """A copy of contrib/setup in a checkout of its own, on a machine that has only these package managers."""
    (folder / "contrib").mkdir()
    shutil.copy(CONTRIB / "setup", folder / "contrib")
    tools = folder / "bin"
    tools.mkdir()
    for name in ("bash", "sh", "env", "dirname", "id", "cat", "true"):
        (tools / name).symlink_to(require(name))
    for name, script in programs.items():
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    return subprocess.run(
        [require("bash"), folder / "contrib" / "setup", *words],
        env={**os.environ, "PATH": str(tools)},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )


@pytest.mark.parametrize(
    ("family", "command"),
    [
        ("fedora", "sudo dnf install gcc pkgconf-pkg-config python3-devel fuse3 fuse3-devel "),
        ("suse", "sudo zypper install gcc pkg-config python3-devel fuse3 fuse3-devel "),
        ("arch", "sudo pacman -S --needed gcc pkgconf python fuse3 "),
    ],
)
@pytest.mark.parametrize("purpose", ["demo", "test"])
def test_others_are_told_their_own_names(tmp_path: Path, family: str, command: str, purpose: str) -> None:
    done = run(tmp_path, MANAGERS[family], purpose)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"install these, then run it again: {command}" in done.stderr
    words = set(done.stderr.split())
    assert {"nginx", "nbdkit", "qemu-img"} <= words
    assert ("fio" in words) == (purpose == "test")  # the demo needs no more than it runs
    assert family == "suse" or not words & DEBIAN_NAMES


def test_a_distribution_that_is_not_known_is_told_debians_names(tmp_path: Path) -> None:
    done = run(tmp_path, MANAGERS["unknown"], "demo")
    assert done.returncode == 1
    assert "on Debian it takes these packages: gcc pkg-config libfuse3-dev" in done.stderr
    assert "contrib/setup --python" in done.stderr


@pytest.mark.parametrize("words", [("tests",), ("--demo",), ("demo", "test")])
def test_what_it_does_not_know(tmp_path: Path, words: tuple[str, ...]) -> None:
    done = run(tmp_path, MANAGERS["fedora"], *words)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1


# What apt-cache prints: Debian has a kernel in one package, Ubuntu in two.
KERNELS = {
    "linux-image-cloud-amd64": (
        {"linux-image-cloud-amd64": ["linux-image-6.1.0-9-cloud-amd64"], "linux-image-6.1.0-9-cloud-amd64": ["kmod"]},
        ["linux-image-6.1.0-9-cloud-amd64"],
    ),
    "linux-image-virtual": (
        {
            "linux-image-virtual": ["linux-image-6.8.0-9-generic"],
            "linux-image-6.8.0-9-generic": ["kmod", "linux-base", "linux-modules-6.8.0-9-generic"],
        },
        ["linux-image-6.8.0-9-generic", "linux-modules-6.8.0-9-generic"],
    ),
}


@pytest.mark.parametrize("name", KERNELS)
def test_the_guests_kernel_is_that_of_the_distribution(tmp_path: Path, name: str) -> None:
    known, wanted = KERNELS[name]
    cases = "".join(f"{key}) printf '  Depends: %s\\n' {' '.join(value)} ;;\n" for key, value in known.items())
    managers = {
        "dpkg-query": "echo installed",  # whatever it is
        "dpkg": "echo amd64",
        "apt-cache": f'case $2 in {cases} *) echo "E: No packages found" >&2; exit 100 ;; esac',
        "apt-get": 'echo "$*" >&2; exit 1',
        "awk": f'exec {require("awk")} "$@"',
        "grep": f'exec {require("grep")} "$@"',
        "mktemp": f'exec {require("mktemp")} "$@"',
        "sha256sum": "echo sum",
        "python3": "echo Python",
    }
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    done = run(tmp_path, managers, "test")
    assert f"unpacking {' '.join(wanted)} for the test guest" in done.stderr
    assert f"download -qq {' '.join(wanted)}" in done.stderr
