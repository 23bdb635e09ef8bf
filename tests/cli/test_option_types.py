"""What users write on the command line, and what it becomes."""

from __future__ import annotations

import click
import pytest

from qedfs.cli.mount_options import expand
from qedfs.cli.option_types import DURATION, RATE, SIZE
from qedfs.cli.served_images import named, stem
from qedfs.cli.wait_goal import Local, Unused, parse_goal
from qedfs.errors import UsageError


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["a", "b"], ["a", "b"]),
        (["-o", "limit=20M,allow_other", "a", "b"], ["--limit=20M", "--allow-other", "a", "b"]),
        (["-olimit=1", "a", "b"], ["--limit=1", "a", "b"]),
        (["a", "b", "-o", "no_stream,no-copy_on_read"], ["a", "b", "--stream=off", "--no-copy-on-read"]),
        (["-o", "rw,nofail,_netdev,x-systemd.automount,noauto,user,noatime,defaults", "a", "b"], ["a", "b"]),
        (["-o", "nodiratime,lazytime,async,owner,nogroup,X-mount.mkdir,silent,norelatime", "a", "b"], ["a", "b"]),
        (["-o", "sync,x", "a", "b"], ["--sync", "--x", "a", "b"]),
        (["-o", "allow_backing=http://a/b=c"], ["--allow-backing=http://a/b=c"]),
        (["-o", "", "-o"], []),
        (["--", "-o", "x"], ["--", "-o", "x"]),
        (["--no-stream", "--", "--no-stream"], ["--stream=off", "--", "--no-stream"]),
    ],
)
def test_mount_options(arguments: list[str], expected: list[str]) -> None:
    assert expand(arguments) == expected


@pytest.mark.parametrize(("text", "size"), [("64K", 65536), ("1.5G", 3 << 29), ("0", 0)])
def test_sizes(text: str, size: int) -> None:
    assert SIZE.convert(text, None, None) == size


@pytest.mark.parametrize(("text", "seconds"), [("30", 30.0), ("10m", 600.0), ("250ms", 0.25)])
def test_durations(text: str, seconds: float) -> None:
    assert DURATION.convert(text, None, None) == seconds


@pytest.mark.parametrize("kind", [SIZE, DURATION])
def test_nonsense_is_a_usage_error(kind: click.ParamType[int] | click.ParamType[float]) -> None:
    with pytest.raises(click.BadParameter, match="write it like"):
        kind.convert("lots", None, None)


def test_goals() -> None:
    assert parse_goal("complete") == Local()
    assert parse_goal("populated:1M-64M") == Local(1 << 20, 64 << 20)
    assert isinstance(parse_goal("unused"), Unused)
    for text in ("populated", "populated:", "populated:64M-1M", "populated:5-5", "done", "populated:x-y"):
        with pytest.raises(UsageError):
            parse_goal(text)


@pytest.mark.parametrize("name", ["disk", "disk.raw", "disk.qed"])
def test_images_go_by_several_names(name: str) -> None:
    assert stem(name) == "disk"
    images = [{"name": "disk.raw"}, {"name": "other.raw"}]
    assert named(images, name, "/mnt") == [{"name": "disk.raw"}]
    assert named(images, None, "/mnt") == images
    with pytest.raises(UsageError, match=r"has no image none; there is disk\.raw, other\.raw"):
        named(images, "none", "/mnt")


@pytest.mark.parametrize(("text", "rate"), [("0", 0), ("1K", 1024), ("20M", 20 << 20)])
def test_rates(text: str, rate: int) -> None:
    assert RATE.convert(text, None, None) == rate


def test_a_rate_without_a_unit_is_most_likely_an_oversight() -> None:
    with pytest.raises(click.BadParameter, match="20 is 20 bytes per second; write 20M for MiB, 20K for KiB"):
        RATE.convert("20", None, None)
    with pytest.raises(click.BadParameter, match=r"0\.5K is 512 bytes per second; the least is 1K"):
        RATE.convert("0.5K", None, None)
