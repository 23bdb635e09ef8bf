"""The rule for a source that is away, as the record has it."""

from __future__ import annotations

import pytest

from qedfs.image.source_errors import EIO, MOST_BOUND_SECONDS, OnSourceError, from_stored

WAIT = OnSourceError(wait=True)


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (EIO, ""),
        (WAIT, "wait"),
        (OnSourceError(wait=True, bound_seconds=300), "wait:300"),
        (OnSourceError(wait=True, bound_seconds=MOST_BOUND_SECONDS), f"wait:{MOST_BOUND_SECONDS}"),
    ],
)
def test_what_is_stored_is_read(rule: OnSourceError, text: str) -> None:
    assert rule.stored() == text
    assert from_stored(text) == rule
    assert rule.action == ("wait" if text else "eio")


@pytest.mark.parametrize("text", ["later", "wait:", "wait:x", "wait:1:2", "eio:3"])
def test_a_rule_of_another_version_is_the_default(text: str) -> None:
    assert from_stored(text) is EIO
