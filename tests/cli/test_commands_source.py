"""`qedfs source`: what it takes. What it does is in tests/mount/test_source_away.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from qedfs.cli.option_types import parse_source_errors
from qedfs.errors import UsageError
from qedfs.image.source_errors import EIO, OnSourceError
from tests.harness.mounts import qedfs


def test_a_rule_as_it_is_typed() -> None:
    assert parse_source_errors("eio") == EIO
    assert parse_source_errors("wait") == OnSourceError(wait=True)
    assert parse_source_errors("wait:10m") == OnSourceError(wait=True, bound_seconds=600)


@pytest.mark.parametrize("text", ["later", "wait:", "wait:0s", "wait:10y", "wait:100000h0", "eio:3s", "Wait"])
def test_a_rule_that_is_none(text: str) -> None:
    with pytest.raises(UsageError):
        parse_source_errors(text)


def test_a_rule_that_is_none_is_one_line(tmp_path: Path) -> None:
    for words in (["later"], ["disk", "eio:3s"], ["disk", "eio", "more"]):
        done = qedfs("source", "on-error", tmp_path, *words, check=False)
        assert done.returncode == 2, words
        assert done.stderr.count("\n") == 1
