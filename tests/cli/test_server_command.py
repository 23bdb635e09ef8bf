"""The command line of a process that serves, and what it inherits."""

from __future__ import annotations

import pytest

from qedfs.cli.server_command import environment


def test_an_empty_entry_of_the_path_does_not_reach_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", ":/opt/lib")
    assert "/opt/lib" in environment()["PYTHONPATH"].split(":")
    assert "" not in environment()["PYTHONPATH"].split(":")
