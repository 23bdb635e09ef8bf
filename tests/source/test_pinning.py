"""What the user lets count as another version."""

from __future__ import annotations

import pytest

from qedfs.source.base import Identity
from qedfs.source.pinning import By, Pinning

MONDAY = "Mon, 01 Jan 2024 00:00:00 GMT"


@pytest.mark.parametrize(
    ("by", "counted"),
    [
        (By.ALL, Identity(1, '"a"', MONDAY, "name", "md5:00", "x")),
        (By.ETAG, Identity(1, '"a"', None, "name", "md5:00", "x")),
        (By.DATE, Identity(1, None, MONDAY, "name", "md5:00", "x")),
        (By.SIZE, Identity(1, None, None, "name", None, "x")),
        (By.NONE, Identity(1, None, None, "name", None, "x")),
    ],
)
def test_what_the_user_lets_count(by: By, counted: Identity) -> None:
    assert Pinning(by).counted(Identity(1, '"a"', MONDAY, "name", "md5:00", "x")) == counted
