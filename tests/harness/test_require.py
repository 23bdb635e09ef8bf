"""A test ends for want of something in one way only, `require`: under CI no skip goes unseen."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.require import unavailable

TESTS = Path(__file__).parents[1]
THE_ONE_PLACE = TESTS / "harness" / "require.py"
EXEMPT = {THE_ONE_PLACE, Path(__file__)}
SKIPS = frozenset({"skip", "skipif", "importorskip", "SkipTest", "skipIf", "skipUnless"})


def skips(text: str) -> Iterator[int]:
    """The lines that use one of pytest's or unittest's ways to skip."""
    if not any(word in text for word in SKIPS):
        return
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
        if isinstance(node, ast.Attribute):
            names.append(node.attr)
        if isinstance(node, ast.ImportFrom | ast.Attribute) and not SKIPS.isdisjoint(names):
            yield node.lineno


def test_only_require_skips() -> None:
    files = [path for path in TESTS.rglob("*.py") if path not in EXEMPT]
    found = [f"{path.relative_to(TESTS)}:{line}" for path in files for line in skips(path.read_text())]
    assert found == [], "use tests/harness/require.py"
    assert list(skips(THE_ONE_PLACE.read_text()))


@pytest.mark.parametrize(
    "text",
    ["pytest.skip('x')", "@pytest.mark.skipif(1)\ndef f(): ...", "from pytest import skip", "pytest.importorskip('x')"],
)
def test_each_way_to_skip_is_seen(text: str) -> None:
    assert list(skips(text))


@pytest.mark.parametrize(("ci", "outcome"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_what_is_missing_fails_a_test_under_ci_only(
    monkeypatch: pytest.MonkeyPatch, ci: str, outcome: type[BaseException]
) -> None:
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match="needs a thing"):
        unavailable("needs a thing")
