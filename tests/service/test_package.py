"""The Debian package, as far as it can be judged unbuilt; contrib/test-package builds, installs and uses it."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.harness.hang import HANG_SECONDS
from tests.harness.require import require

from .machine import CONTRIB, ROOT, UNITS

DEBIAN = CONTRIB / "debian"
MADE = "debian/made/"  # by debian/rules, while the package is built
RELATION = re.compile(r"(?P<name>[a-z0-9.+-]+)(?: \((?P<version>[^)]*)\))?")


def relations(field: str, paragraph: int) -> dict[str, str]:
    """The packages of a field of control and the versions that it asks for; "" for any."""
    text = (DEBIAN / "control").read_text().split("\n\n")[paragraph]
    found = re.search(rf"^{field}:((?:\n .*)+)", text, re.MULTILINE)
    assert found is not None
    words = [word.strip() for word in found[1].split(",") if word.strip() and "${" not in word]
    return {match["name"]: match["version"] or "" for word in words if (match := RELATION.fullmatch(word))}


def requirements(words: list[str]) -> dict[str, str]:
    """What pip would install, by Debian's names."""
    found = {}
    for word in words:
        name, _, version = word.partition(">=")
        found[f"python3-{name.lower().replace('_', '-')}"] = f">= {version}"
    return found


@pytest.fixture
def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


def test_it_depends_on_what_pip_would_install(project: dict[str, Any]) -> None:
    wanted = requirements(project["dependencies"])
    depends = relations("Depends", 1)
    assert {name: depends.get(name) for name in wanted} == wanted
    assert depends.keys() - wanted.keys() == {"fuse3"}
    # Manual pages and completion are made by running the commands.
    build = relations("Build-Depends", 0)
    assert {name: build.get(name) for name in wanted} == wanted


def test_it_recommends_what_pip_takes_as_extras(project: dict[str, Any]) -> None:
    extras = project["optional-dependencies"]
    names = {"python3-zstandard": "zstd", "python3-prometheus-client": "metrics"}
    wanted = {package: version for extra in names.values() for package, version in requirements(extras[extra]).items()}
    assert relations("Recommends", 1) == wanted


def test_it_needs_the_python_that_we_need(project: dict[str, Any]) -> None:
    assert f"X-Python3-Version: {project['requires-python'].replace('>=', '>= ')}\n" in (DEBIAN / "control").read_text()


@pytest.mark.parametrize("kind", ["install", "docs", "examples", "manpages"])
def test_what_it_installs_is_there(kind: str) -> None:
    for line in (DEBIAN / f"qedfs.{kind}").read_text().splitlines():
        pattern = line.split()[0]
        assert pattern.startswith(MADE) or list(ROOT.glob(pattern)), line


def test_its_units_run_the_program_of_the_package() -> None:
    (script,) = re.findall(r"sed -i '(.*?)'", (DEBIAN / "rules").read_text())
    done = subprocess.run(
        [require("sed"), script, *UNITS], capture_output=True, text=True, timeout=HANG_SECONDS, check=True
    )
    programs = set(re.findall(r"[\w/]*/bin/qedfs\b", done.stdout))
    assert programs == {"/usr/bin/qedfs"}


def test_no_person_stands_in_it() -> None:
    """Whoever builds it is its maintainer: contrib/package puts the name in."""
    assert "\nMaintainer: @MAINTAINER@\n" in (DEBIAN / "control").read_text()
    assert not (DEBIAN / "changelog").exists()


@pytest.mark.parametrize("script", ["qedfs.postinst", "qedfs.prerm"])
def test_its_scripts_have_no_error_of_syntax(script: str) -> None:
    words: list[str | Path] = [require("sh"), "-n", DEBIAN / script]
    done = subprocess.run(words, capture_output=True, text=True, timeout=HANG_SECONDS, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("unit", "left_alone"),
    [("qedfs@vm1.service", True), ("qedfs-wait@vm1.service", True), ("qedfs.service", False), ("x-qedfs@vm1", False)],
)
def test_needrestart_leaves_its_units_alone(unit: str, left_alone: bool) -> None:
    """Which evaluates the files of conf.d as Perl, and takes the first pattern that matches."""
    program = """
        our %nrconf = (override_rc => {});
        do shift // die;
        my $unit = shift;
        print grep { $unit =~ $_ && !$nrconf{override_rc}{$_} } keys %{$nrconf{override_rc}};
    """
    words: list[str | Path] = [require("perl"), "-e", program, CONTRIB / "needrestart" / "qedfs.conf", unit]
    done = subprocess.run(words, capture_output=True, text=True, timeout=HANG_SECONDS, check=True)
    assert (done.stdout != "", done.stderr) == (left_alone, "")
