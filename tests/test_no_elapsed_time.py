"""No test judges by how long something took: a machine with other work is slow, and nothing is wrong then.

Every file is parsed, none is imported. What a test may do instead stands in `harness/hang.py`: count work, run on the
mock clock, or wait with the one bound that catches hangs.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.hang import HANG_SECONDS

TESTS = Path(__file__).parent
REAL_CLOCKS = frozenset({"time", "monotonic", "perf_counter", "process_time", "thread_time", "clock_gettime"})
# Fixtures with which a test runs on a clock that nothing but its own waits moves.
MOCK_CLOCKS = frozenset({"autojump_clock", "hands"})
# Calls that take nothing but the seconds after which they raise, or come back empty-handed.
LIMITED = frozenset({"fail_after", "wait", "wait_exit", "join"})
# What a file says that measures. The others need not be parsed, which takes three seconds of processor time for all.
MAY_MEASURE = re.compile(
    r"\bimport time\b|\bfrom time\b|current_time"
    r"|\b(timeout|timeout_seconds|fail_after|wait|wait_exit|join)\s*[(=]\s*[\d.]"
)
# Files that read a real clock, and judge nothing by it.
READERS = {
    "harness/process.py": "its waits end with HANG_SECONDS",
    "harness/starter.py": "its waits end with HANG_SECONDS",
    "harness/terminal.py": "its waits end with HANG_SECONDS; it watches a screen for a while",
    "harness/migration/flow.py": "its waits end with HANG_SECONDS; contrib/migration prints its times",
    "harness/migration/machine.py": "it notes when a line of the console came, for contrib/migration",
    "harness/migration/scene.py": "the same",
    "faults/soak.py": "it goes on for as long as it is told",
    "faults/test_failed_commit.py": "a time of day in the status lies between two readings, however far apart",
}


class Source:
    """One parsed file below tests/."""

    def __init__(self, path: str, text: str) -> None:
        self.path = path
        self.text = text
        self.tree = ast.parse(text, filename=path)
        self.nodes = tuple(ast.walk(self.tree))
        self.functions = [node for node in self.nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]

    def at(self, node: ast.expr, rule: str) -> str:
        return f"tests/{self.path}:{node.lineno}: {ast.unparse(node)}: {rule}"


def complaints(path: str, text: str) -> list[str]:
    """The places at which a file measures."""
    if not MAY_MEASURE.search(text):
        return []
    source = Source(path, text)
    return [*real_clocks(source), *loop_clocks(source), *short_waits(source)]


def real_clocks(source: Source) -> Iterator[str]:
    """Readings of a clock of the machine, under whatever name."""
    if source.path in READERS:
        return
    for node in source.nodes:
        if isinstance(node, ast.ImportFrom) and node.module == "time":
            for name in node.names:
                if _is_real_clock(name.name):
                    yield f"tests/{source.path}:{node.lineno}: time.{name.name}: a test reads no clock of the machine"
        elif isinstance(node, ast.Attribute) and _name(node.value) == "time" and _is_real_clock(node.attr):
            yield source.at(node, "a test reads no clock of the machine")


def loop_clocks(source: Source) -> Iterator[str]:
    """Readings of trio's clock in a test, or in a helper that it names, which does not run on the mock clock."""
    if "current_time" not in source.text:
        return
    readers = _readers(source)
    for function in source.functions:
        if function.name.startswith("test_") and not MOCK_CLOCKS & _arguments(function):
            for node in _names(function):
                if _is_loop_clock(node) or _name(node) in readers:
                    yield source.at(node, "only a test on the mock clock reads the time")


def short_waits(source: Source) -> Iterator[str]:
    """Waits that fail after a number of seconds, in a test that does not run on the mock clock."""
    on_mock_clock = {
        node for function in source.functions if MOCK_CLOCKS & _arguments(function) for node in ast.walk(function)
    }
    for node in source.nodes:
        if isinstance(node, ast.Call) and node not in on_mock_clock:
            for limit in _limits(node):
                if isinstance(limit, ast.Constant) and isinstance(limit.value, int | float) and _is_short(limit.value):
                    yield source.at(node, "a wait that may fail takes HANG_SECONDS")


def _limits(call: ast.Call) -> Iterator[ast.expr]:
    """What a call takes as the seconds after which it gives up."""
    if isinstance(call.func, ast.Attribute | ast.Name):
        if _name(call.func) in LIMITED and len(call.args) == 1:
            yield call.args[0]
        yield from (word.value for word in call.keywords if word.arg in ("timeout", "timeout_seconds"))


def _readers(source: Source) -> set[str]:
    """Names of the helpers, and of the classes with such methods, that read trio's clock for their callers."""
    return {
        node.name
        for node in source.tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if not node.name.startswith("test_") and any(_is_loop_clock(inner) for inner in ast.walk(node))
    }


def _is_short(seconds: float) -> bool:
    return 0 < seconds < HANG_SECONDS


def _is_real_clock(name: str) -> bool:
    return name.removesuffix("_ns") in REAL_CLOCKS


def _is_loop_clock(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "current_time" and _name(node.value) == "trio"


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    return {argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)}


def _names(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[ast.Name | ast.Attribute]:
    for statement in function.body:
        yield from (node for node in ast.walk(statement) if isinstance(node, ast.Name | ast.Attribute))


def test_no_test_measures_how_long_something_takes() -> None:
    paths = sorted(TESTS.rglob("*.py"))
    wrong = [line for path in paths for line in complaints(str(path.relative_to(TESTS)), path.read_text())]
    assert not wrong, "\n".join(wrong)


def test_every_exception_is_needed() -> None:
    for path in READERS:
        text = (TESTS / path).read_text()
        assert list(real_clocks(Source("else.py", text))), path


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("import time\ndef test_x():\n  assert time.monotonic() - began < 1", "tests/x.py:3: time.monotonic: a test"),
        ("import time\ndef helper():\n  return time.perf_counter_ns()", "tests/x.py:3: time.perf_counter_ns"),
        ("from time import process_time", "tests/x.py:1: time.process_time"),
        ("import time\ntime.sleep(1)", None),
        ("async def test_x():\n  assert trio.current_time() < 1", "tests/x.py:2: trio.current_time: only a test on"),
        ("async def test_x(autojump_clock):\n  assert trio.current_time() < 1", None),
        ("async def took():\n  return trio.current_time()\nasync def test_x():\n  await took()", "tests/x.py:4: took"),
        ("async def took():\n  return trio.current_time()\nasync def test_x(autojump_clock):\n  await took()", None),
        (
            "async def test_x():\n  with trio.fail_after(5):\n    await thing()",
            "tests/x.py:2: trio.fail_after(5): a wait",
        ),
        ("async def test_x():\n  with trio.fail_after(HANG_SECONDS):\n    await thing()", None),
        ("async def test_x(autojump_clock):\n  with trio.fail_after(5):\n    await thing()", None),
        ("def test_x():\n  subprocess.run(['x'], timeout=20)", "a wait that may fail takes HANG_SECONDS"),
        ("def test_x():\n  wait_for(ready, 'it', timeout_seconds=5.0)", "a wait that may fail takes HANG_SECONDS"),
    ],
)
def test_rule(text: str, complaint: str | None) -> None:
    found = complaints("x.py", text)
    if complaint is None:
        assert found == []
    else:
        assert [complaint in line for line in found] == [True]
