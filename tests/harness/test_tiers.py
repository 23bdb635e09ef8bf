"""Each test has its tiers, told from what it uses, and can use no more than that."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness import guest
from tests.harness.mounts import mounted, qedfs
from tests.harness.require import only, require, require_fuse, require_root
from tests.harness.servers import nginx
from tests.harness.tiers import TIERS, UNIT, tiers_of


def test_each_test_has_a_tier(request: pytest.FixtureRequest) -> None:
    for item in request.session.items:
        found = {tier for tier in TIERS if item.get_closest_marker(tier)}
        assert found, item.nodeid
        assert found == {UNIT} or UNIT not in found, item.nodeid


def plain() -> None:
    Path().exists()


def by_a_helper() -> None:
    with nginx(Path()):
        pass


def by_a_module() -> None:
    guest.boot("")


def by_a_nested_function() -> None:
    def inner() -> None:
        require_root()

    inner()


def by_two() -> None:
    with mounted(Path(), Path()):
        pass


class Tool:
    def run(self) -> None:
        require("sh")


def by_a_class() -> None:
    Tool().run()


TABLE = {"one": functools.partial(by_a_nested_function)}


def by_a_table() -> None:
    TABLE["one"]()


def by_a_command() -> None:
    qedfs("mount", "disk.qed", "mnt", "--daemon")


def by_a_command_that_cannot_mount() -> None:
    qedfs("mount", "--help")


@pytest.mark.parametrize(
    ("function", "tiers"),
    [
        (plain, {"unit"}),
        (by_a_helper, {"servers"}),
        (by_a_module, {"servers"}),
        (by_a_nested_function, {"root"}),
        (by_two, {"fuse", "servers"}),
        (by_a_class, {"servers"}),
        (by_a_table, {"root"}),
        (by_a_command, {"fuse"}),
        (by_a_command_that_cannot_mount, {"unit"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_a_test_uses_is_seen(
    request: pytest.FixtureRequest, function: Callable[[], None], tiers: set[str]
) -> None:
    made = pytest.Function.from_parent(request.node.parent, name=function.__name__, callobj=function)
    assert tiers_of(made) == tiers


@pytest.mark.parametrize(
    ("needs", "tier"), [(require_fuse, "fuse"), (require_root, "root"), (lambda: require("sh"), "servers")]
)
def test_a_test_cannot_use_more_than_its_tiers_have(needs: Callable[[], None], tier: str) -> None:
    told = f"its tiers are unit: mark it with @pytest.mark.{tier}"
    with only({UNIT}), pytest.raises(pytest.fail.Exception, match=told):
        needs()
