"""An option that is given twice is refused: click would heed the last one and say nothing."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from qedfs.cli.given_once import GivenOnce
from tests.mount.test_user_errors import USAGE, failing


@click.command(cls=GivenOnce)
@click.argument("place", nargs=-1)
@click.option("--limit", "-l", type=int)
@click.option("--keep/--no-keep", default=None)
@click.option("--verbose", is_flag=True)
@click.option("--allow", multiple=True)
def command(**_: object) -> None:
    """Do nothing."""


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--limit", "1", "--limit", "2"], "--limit is given 2 times; give it once"),
        (["--limit=1", "x", "-l", "1", "-l1"], "--limit is given 3 times; give it once"),
        (["--keep", "--no-keep"], "--keep or --no-keep is given 2 times; give it once"),
    ],
)
def test_repeated_options(words: list[str], what: str) -> None:
    with pytest.raises(click.UsageError, match=what):
        command.main(words, standalone_mode=False)


@pytest.mark.parametrize(
    "words",
    [
        ["--limit", "1", "--", "--limit", "2"],
        ["--verbose", "--verbose"],
        ["--allow", "a", "--allow", "b", "x", "y"],
        [],
    ],
)
def test_what_may_stand_there(words: list[str]) -> None:
    command.main(words, standalone_mode=False)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--timeout", ["wait", "mnt"]),
        ("--wait", ["umount", "mnt"]),
        ("--source-timeout", ["export", "disk.qed", "disk.raw"]),
        ("--png", ["map", "disk.qed"]),
        ("--timeout", ["doctor"]),
        ("--source-timeout", ["create", "disk.qed", "--backing", "x"]),
    ],
)
def test_all_commands_with_values_have_it(option: str, words: list[str]) -> None:
    line = failing(USAGE, *words, option, "1", option, "2")
    assert line == f"qedfs: {option} is given 2 times; give it once (see qedfs {words[0]} --help)"


def test_the_commands_have_it(tmp_path: Path) -> None:
    line = failing(USAGE, "mount", tmp_path, tmp_path, "--limit", "1M", "-o", "limit=2M")
    assert line == "qedfs: --limit is given 2 times; give it once (see qedfs mount --help)"
    line = failing(USAGE, "stream", "start", tmp_path, "--limit", "1M", "--limit", "2M")
    assert line == "qedfs: --limit is given 2 times; give it once (see qedfs stream start --help)"
