"""What the papers for developers name exists: files, functions, tests, scripts."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each paper, and the folder that its paths are relative to.
PAPERS = {"qedfs/README.md": "qedfs", "tests/README.md": ".", "contrib/CONTRIBUTING.md": "."}

# `fetch/queue.py`, `fetch/queue.py:FetchQueue.read`, `tests/faults/`, `contrib/powercut`
NAMED = re.compile(r"`([\w.-]+/[\w./-]*|[\w-]+\.py)(?::([\w.]+))?`")


def named(text: str) -> Iterator[tuple[str, str]]:
    """The paths in backquotes, and the function that follows a colon, if there is one."""
    yield from NAMED.findall(text)


@functools.cache
def defined(path: Path) -> frozenset[str]:
    """Functions, classes and constants of a file; those of a class with its name before them."""
    return frozenset(_defined(ast.parse(path.read_text()), ""))


def _defined(node: ast.AST, prefix: str) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield prefix + child.name
            if isinstance(child, ast.ClassDef):
                yield from _defined(child, f"{child.name}.")
        elif isinstance(child, ast.Assign | ast.AnnAssign):
            targets = child.targets if isinstance(child, ast.Assign) else [child.target]
            yield from (prefix + target.id for target in targets if isinstance(target, ast.Name))


def missing(path: str, function: str, folder: str) -> bool:
    """Whether there is no such file, or not this function in it."""
    places = [place for place in (ROOT / folder / path, ROOT / path) if place.exists()]
    if not places:
        return True
    return bool(function) and function not in defined(places[0])


@pytest.mark.parametrize("paper", PAPERS)
def test_what_a_paper_names_exists(paper: str) -> None:
    found = list(named((ROOT / paper).read_text()))
    assert len(found) > 10
    assert [f"{path}:{function}" for path, function in found if missing(path, function, PAPERS[paper])] == []


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("`fetch/queue.py` and `fetch/queue.py:FetchQueue.read`, `qedfs/fetch/`, `errors.py`", []),
        ("`fetch/none.py`", ["fetch/none.py"]),
        ("`fetch/queue.py:FetchQueue.none`", ["fetch/queue.py"]),
        ("`fetch/queue.py:read`", ["fetch/queue.py"]),
        ("`none.py`", ["none.py"]),
        ("`kill -9` and `qedfs stream pause` are no paths", []),
    ],
)
def test_what_does_not_exist_is_found(text: str, wrong: list[str]) -> None:
    assert [path for path, function in named(text) if missing(path, function, "qedfs")] == wrong
