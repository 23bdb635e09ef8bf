"""`mount --daemon` hands every option of `mount` on to the process that serves."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click
import pytest

from qedfs.cli.command_line import arguments_for
from qedfs.cli.commands.mount import _absolute, mount
from qedfs.cli.mount_arguments import MountArguments

# Of this process alone: whether it serves itself, and who waits for it or holds the mount.
NOT_HANDED_ON = {"in_background", "ready_fd", "restart", "most_deaths", "holder_fd"}
WORDS = {
    "stream_between": "22:00-06:00",
    "stream_delay": "30s-2m",
    "limit": "20M",
    "limit_total": "100M",
    "source_timeout": "17s",
    "on_source_error": "wait:10m",
    "allow_backing": "http://a/ --daemon",
    "metrics": "unix:here/metrics",
}
OPTIONS = [one for one in mount.params if isinstance(one, click.Option) and one.name not in NOT_HANDED_ON]


def _parsed(words: list[str]) -> MountArguments:
    options = dict(mount.make_context("mount", words).params)
    return MountArguments(**_absolute({name: value for name, value in options.items() if name not in NOT_HANDED_ON}))


def _words(option: click.Option) -> list[list[str]]:
    """The option in each way that says something else than its default."""
    names = [option.opts[0], *option.secondary_opts[:1]]
    if option.is_flag:
        return [[name] for name in names]
    if isinstance(option.type, click.Choice):
        return [[names[0], str(value)] for value in option.type.choices]
    return [[names[0], WORDS.get(str(option.name), "-a name,of=it")]]


@pytest.mark.parametrize("option", OPTIONS, ids=[one.opts[0] for one in OPTIONS])
def test_an_option_is_handed_on(option: click.Option, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    plain = _parsed(["source", "mnt"])
    said = [_parsed([*words, "source", "mnt"]) for words in _words(option)]
    assert any(one != plain for one in said)
    monkeypatch.chdir("/")
    for one in [plain, *said]:
        assert _parsed(arguments_for(mount, dataclasses.asdict(one))) == one


def test_places_are_handed_on_as_seen_from_any_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    places = [one for one in mount.params if isinstance(one.type, click.Path)]
    options = [word for one in places if isinstance(one, click.Option) for word in (one.opts[0], "here")]
    arguments = dataclasses.asdict(_parsed([*options, "here", "here"]))
    assert [arguments[str(one.name)] for one in places] == [str(tmp_path / "here")] * len(places)


def test_nothing_is_kept_that_is_no_option() -> None:
    names = {field.name for field in dataclasses.fields(MountArguments)}
    assert names == {one.name for one in mount.params if one.expose_value} - NOT_HANDED_ON
