"""Libraries that are missing, too old or of the wrong kind, and what `qedfs doctor` says of them."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from qedfs.cli.doctor import fuse_checks, library_checks, machine_checks
from qedfs.cli.doctor.finding import Verdict
from qedfs.cli.doctor.library_checks import NEEDED, OPTIONAL
from qedfs.source.libcurl import Libcurl
from tests.harness.hang import HANG_SECONDS

NOW = (3, 13)
EVERYTHING = {**NEEDED, **{name: least for name, (least, _) in OPTIONAL.items()}}
CURL = Libcurl("8.14.1", "OpenSSL/3.5.4", frozenset({"file", "http", "https"}), "7.45.6")


def test_the_packages_are_those_of_the_project() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    said = dict(line.split(">=") for line in project["dependencies"])
    assert said == NEEDED
    extras = project["optional-dependencies"]
    assert {name: f"{name}>={least}" for name, (least, _) in OPTIONAL.items()} == {
        "prometheus_client": extras["metrics"][0],
        "zstandard": extras["zstd"][0],
    }


def test_a_missing_package() -> None:
    found = library_checks.packages({name: least for name, least in EVERYTHING.items() if name != "trio"}, NOW)
    assert (found.verdict, found.way_out) == (Verdict.FAIL, "install qedfs anew")
    assert found.found.startswith("trio not found; there are pyfuse3 3.4, ")


def test_an_old_package() -> None:
    found = library_checks.packages({**EVERYTHING, "rich": "13.7.1"}, NOW)
    assert (found.verdict, found.way_out) == (Verdict.WARN, "have at least rich 13.9")


@pytest.mark.parametrize("number", ["3.4.0", "3.10", "4.0b1", "3.4.dev2"])
def test_versions_are_compared_as_numbers(number: str) -> None:
    assert library_checks.packages({**EVERYTHING, "pyfuse3": number}, NOW).verdict is Verdict.OK


def test_what_is_optional_is_named_with_its_purpose() -> None:
    assert library_checks.packages(NEEDED, NOW).found.endswith(
        ", no prometheus_client (for --metrics), no zstandard (for qcow2 images packed with zstd)"
    )
    assert library_checks.packages(NEEDED, (3, 14)).found.endswith(", no prometheus_client (for --metrics)")
    assert library_checks.packages(NEEDED, NOW).verdict is Verdict.OK


@pytest.mark.parametrize(
    ("curl", "verdict", "text"),
    [
        (CURL, Verdict.OK, "8.14.1 with OpenSSL/3.5.4, pycurl 7.45.6, http and https"),
        (Libcurl("7.86.0", CURL.tls, CURL.protocols, CURL.binding), Verdict.WARN, "look-up of a server's name"),
        (
            Libcurl("8.14.1", "", frozenset({"http"}), CURL.binding),
            Verdict.FAIL,
            "with no TLS, pycurl 7.45.6, without https",
        ),
    ],
)
def test_libcurl(curl: Libcurl, verdict: Verdict, text: str) -> None:
    found = library_checks.curl(curl)
    assert found.verdict is verdict
    assert text in found.found


def test_certificates_that_are_missing(tmp_path: Path) -> None:
    empty, good = tmp_path / "empty.pem", tmp_path / "good.pem"
    empty.touch()
    good.write_text("-----BEGIN CERTIFICATE-----\n...\n" * 3)
    assert library_checks.authorities([], None).verdict is Verdict.WARN
    assert "No such file" in library_checks.authorities([str(tmp_path / "none.pem")], None).found
    assert "has no certificate" in library_checks.authorities([str(empty)], None).found
    assert (
        library_checks.authorities([str(good), str(good)], "/my/folder").found
        == f"3 in {good}, and those in /my/folder"
    )


@pytest.mark.parametrize("broken", ["pyfuse3", "pycurl", "trio", "idna"])
def test_the_checks_work_where_a_library_does_not(broken: str) -> None:
    """Otherwise whoever needs them most could not run them."""
    words = f"import sys; sys.modules[{broken!r}] = None; from qedfs.cli.main import main; main(['doctor'])"
    done = subprocess.run(
        [sys.executable, "-c", words], capture_output=True, text=True, timeout=HANG_SECONDS, check=False
    )
    assert (done.returncode, done.stderr) == (1, "")
    names = [name for checks in (library_checks, machine_checks, fuse_checks) for name, _ in checks.checks()]
    assert [line[6:26].strip() for line in done.stdout.splitlines()] == names
    assert any(f"{broken} cannot be loaded" in line for line in done.stdout.splitlines() if line.startswith("FAIL"))
