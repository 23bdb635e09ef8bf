"""What a server tells the next one of a failed barrier. With a real disk: `tests/faults/test_failing_disk.py`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from qedfs.errors import ReadOnlyOverlay
from qedfs.mount import failed_barriers
from qedfs.mount.held import HolderLink
from qedfs.mount.served import Served

from .test_inode_numbers import Values


def served(inode: int, failure: ReadOnlyOverlay | None, inherited: list[str]) -> Served:
    overlay = SimpleNamespace(failure=failure, inherit_failure=inherited.append)
    return Served("a", "/a.qed", inode, (0, 0, 0), cast("Any", SimpleNamespace(overlay=overlay)), None)


@pytest.mark.parametrize(
    ("failure", "inode", "inherited"),
    [(ReadOnlyOverlay("cannot sync"), 5, ["cannot sync"]), (ReadOnlyOverlay("cannot sync"), 6, []), (None, 5, [])],
)
def test_the_same_image_has_the_failure_in_the_next_server(
    failure: ReadOnlyOverlay | None, inode: int, inherited: list[str]
) -> None:
    link, found = Values(), list[str]()
    failed_barriers.note(cast("HolderLink", link), served(5, failure, []))
    failed_barriers.restore(link.values, served(inode, None, found))
    assert found == inherited
