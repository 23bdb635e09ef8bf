"""What the libcurl of this machine says of itself, and what qedfs needs of it."""

from __future__ import annotations

import sys

import pytest

from qedfs.errors import QedfsError
from qedfs.source.libcurl import Libcurl, libcurl


def test_the_libcurl_of_this_machine_will_do() -> None:
    found = libcurl()
    assert found.lacks == set()
    assert found.tls
    assert all(part.isdecimal() for part in found.version.split(".")[:2])
    assert all(part.isdecimal() for part in found.binding.split(".")[:2])


@pytest.mark.parametrize(("version", "quickly"), [("7.86.0", False), ("7.87.0", True), ("8.0.1", True), ("8.14", True)])
def test_from_which_version_on_a_transfer_can_be_cancelled_at_any_time(version: str, quickly: bool) -> None:
    assert Libcurl(version, "", frozenset(), "7.45.4").cancels_quickly is quickly


def test_what_is_lacking() -> None:
    assert Libcurl("8.14.1", "", frozenset({"http", "ftp"}), "7.45.4").lacks == {"https"}


def test_a_pycurl_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycurl", None)
    with pytest.raises(QedfsError, match="pycurl cannot be loaded"):
        libcurl()
