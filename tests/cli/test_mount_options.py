"""`-o key=value,...` as fstab has it becomes the long options of `mount`."""

from __future__ import annotations

import pytest

from qedfs.cli.mount_options import expand
from qedfs.errors import UsageError


@pytest.mark.parametrize(
    ("given", "expanded"),
    [
        (["a", "b"], ["a", "b"]),
        (["-o", "limit=20M,until_streamed", "m"], ["--limit=20M", "--until-streamed", "m"]),
        (["-olimit=20M", "m"], ["--limit=20M", "m"]),
        (["-o", "ro"], ["--read-only"]),
        (["-o", "allow_backing=/a=b"], ["--allow-backing=/a=b"]),
        (["-o", "defaults,noauto,_netdev,nofail,x-systemd.automount,rw,noatime,user,comment=x"], []),
        (["-o", ",,limit=1,"], ["--limit=1"]),
        (["--", "-o", "x"], ["--", "-o", "x"]),
        (["--once", "-o"], ["--once"]),
    ],
)
def test_expand(given: list[str], expanded: list[str]) -> None:
    assert expand(given) == expanded


def test_a_mount_cannot_get_other_options() -> None:
    with pytest.raises(UsageError, match="the options of a mount cannot be changed"):
        expand(["-o", "rw,remount"])
