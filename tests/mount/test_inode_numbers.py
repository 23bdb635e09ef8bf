"""Numbers and opens of images over two servers: an image gets its own back, and nothing else does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from qedfs.mount.held import HolderLink
from qedfs.mount.inode_numbers import InodeNumbers
from qedfs.mount.served import Served


class Values:
    """A link that only remembers."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def set(self, key: str, value: str) -> None:
        self.values[key] = value

    def drop(self, key: str) -> None:
        self.values.pop(key, None)


def image(found: str, *marks: str) -> Any:
    overlay = SimpleNamespace(found_mark=found, marks=lambda: marks, mark=lambda: marks[0], record=NO_RECORD)
    return SimpleNamespace(overlay=overlay, writable=True, in_standby=False)


NO_RECORD = SimpleNamespace(standby="")


def served(numbers: InodeNumbers, name: str, file: int, found: str, *marks: str) -> Served:
    """An image that was just opened, admitted."""
    one = Served(name, f"/{name}.qed", 0, (file, 0, 0), image(found, *marks))
    numbers.admit(one)
    return one


def first_server() -> dict[str, str]:
    """What a server tells that has had a.raw open twice."""
    link = Values()
    numbers = InodeNumbers(cast("HolderLink", link))
    for name in ("a", "b"):
        one = served(numbers, name, ord(name), "", "session-", "#8.")
        for _ in range(2 if name == "a" else 0):
            one.note_open()
            numbers.opened(one)
    return link.values


def test_the_next_server_gives_an_image_its_number_and_its_opens() -> None:
    told = first_server()
    numbers = InodeNumbers(cast("HolderLink", Values()), told)
    b = served(numbers, "b", ord("b"), "session-1", "session-", "#8.")
    a = served(numbers, "a", ord("a"), "#8.", "session-", "#9.")  # the first server has closed it in order
    new = served(numbers, "c", ord("c"), "", "session-", "#1.")
    assert (a.inode, a.opens, b.inode, b.opens) == (2, 2, 3, 0)
    assert new.inode > 3


def test_a_release_that_was_noted_is_known_to_the_next_server() -> None:
    link = Values()
    numbers = InodeNumbers(cast("HolderLink", link))
    a = served(numbers, "a", ord("a"), "", "session-", "#8.")
    first, second = numbers.opened(a), numbers.opened(a)
    numbers.released(first, a)
    later = InodeNumbers(cast("HolderLink", link), dict(link.values))
    again = served(later, "a", ord("a"), "session-1", "session-")
    assert (again.opens, again.handles) == (1, {second})
    assert later.opened(again) > second  # a release that the kernel repeats must not meet another open


def test_a_release_before_the_image_is_opened_again_counts() -> None:
    told = first_server()
    link = Values()
    link.values = dict(told)
    numbers = InodeNumbers(cast("HolderLink", link), told)
    gone, left = sorted(int(key.removeprefix("open/")) for key in told if key.startswith("open/"))
    numbers.released(gone)  # while the overlay is locked by somebody else
    a = served(numbers, "a", ord("a"), "session-1", "session-", "#8.")
    assert (a.opens, a.handles) == (1, {left})
    assert f"open/{gone}" not in link.values


def test_opens_of_a_server_of_an_earlier_format_count_too() -> None:
    told = first_server()
    opens = [key for key in told if key.startswith("open/")]
    link = Values()
    numbers = InodeNumbers(cast("HolderLink", link), {**told, "opens/2": "3"})
    a = served(numbers, "a", ord("a"), "session-1", "session-", "#8.")
    assert (a.opens, len(a.handles)) == (5, len(opens))
    a.note_release()
    numbers.note_opens(a)
    assert link.values["opens/2"] == "2"


@pytest.mark.parametrize(
    ("file", "mark"), [(ord("a"), "another-1"), (ord("a"), "#81."), (ord("a"), "!session-1"), (99, "session-1")]
)
def test_an_overlay_that_somebody_else_has_changed_is_another_image(file: int, mark: str) -> None:
    numbers = InodeNumbers(cast("HolderLink", Values()), first_server())
    one = served(numbers, "a", file, mark, "session-", "#8.")
    assert one.inode not in (2, 3)
    assert one.opens == 0


def test_a_number_is_never_used_again() -> None:
    link = Values()
    numbers = InodeNumbers(cast("HolderLink", link))
    last = served(numbers, "a", 7, "", "session-").inode
    numbers.forget(Served("a", "/a.qed", last, (7, 0, 0)))
    assert served(InodeNumbers(cast("HolderLink", Values()), link.values), "a", 8, "", "session-").inode > last
    assert "image/2" not in link.values


def test_an_image_that_was_closed_for_the_next_server_has_its_last_mark() -> None:
    link = Values()
    numbers = InodeNumbers(cast("HolderLink", link))
    one = served(numbers, "a", 7, "", "#5.")
    numbers.note_closed(one)
    again = InodeNumbers(cast("HolderLink", Values()), link.values)
    assert served(again, "a", 7, "#5.", "#6.").inode == one.inode
