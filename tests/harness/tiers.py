"""The tier of each test, told from what the test uses: no list to keep, no marker to forget.

Owns which helpers of `require` stand for which tier, and the search for them: from a test's own code and its fixtures
through all that they name below `tests/`. Knows nothing of what a helper does. What the search cannot see (a program
that is started by hand) a test says with a marker; `require` fails a test that needs more than its tier has.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from . import require

# The tier of a test that needs nothing but Python: no root, no FUSE, no other program.
UNIT = "unit"
HELPERS = {
    require.require_fuse: "fuse",
    require.require_root: "root",
    require.require: "servers",
    require.require_guest: "servers",
}
TIERS = (UNIT, *sorted({*HELPERS.values()}))


def tiers_of(item: pytest.Function) -> frozenset[str]:
    """The tiers of a test: what it needs, by its markers and by what it uses, or `unit`."""
    found = {tier for tier in TIERS if item.get_closest_marker(tier)}
    for definitions in item._fixtureinfo.name2fixturedefs.values():
        for definition in definitions:
            found |= _needs(definition.func)
    found |= _needs(item.function)
    if hasattr(item, "callspec"):
        for thing in _helpers(item.callspec.params.values()):
            found |= _needs(thing)
    return frozenset(found or {UNIT})


@functools.cache
def _needs(start: Any) -> frozenset[str]:
    """The tiers of all helpers that a function or a class can reach by name."""
    seen: set[Any] = set()
    found: set[str] = set()
    waiting = [_bare(start)]
    while waiting:
        thing = waiting.pop()
        if thing in seen:
            continue
        seen.add(thing)
        if _mounts_by_command(thing):
            found.add("fuse")
        if thing in HELPERS:
            found.add(HELPERS[thing])
        else:
            waiting += _named(thing)
    return frozenset(found)


def _mounts_by_command(thing: Any) -> bool:
    """Whether a function's code says `qedfs("mount", ..., "--daemon")`, which is no helper's business."""
    if not isinstance(thing, types.FunctionType) or "qedfs" not in _names(thing.__code__):
        return False
    return {"mount", "--daemon"} <= set(_constants(thing.__code__))


@functools.cache
def _named(thing: Any) -> tuple[Any, ...]:
    """The functions and classes of the tests that a function's code or a class's members name."""
    if isinstance(thing, type):
        return tuple(_helpers([*vars(thing).values(), *thing.__bases__]))
    names = _names(thing.__code__)
    # What a nested function or a decorated one has caught.
    values = [cell.cell_contents for cell in thing.__closure__ or () if _is_set(cell)]
    for name in names & thing.__globals__.keys():
        value = thing.__globals__[name]
        if isinstance(value, types.ModuleType) and value.__name__.startswith("tests."):
            values += [vars(value)[member] for member in names & vars(value).keys()]
        values.append(value)
    return tuple(_helpers(values))


@functools.cache
def _names(code: types.CodeType) -> frozenset[str]:
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return frozenset(code.co_names).union(*inner)


def _constants(code: types.CodeType) -> Iterator[str]:
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _constants(constant)
        elif isinstance(constant, str):
            yield constant
        elif isinstance(constant, tuple):
            yield from (each for each in constant if isinstance(each, str))


def _is_set(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - raises where a name has no value yet
    except ValueError:
        return False
    return True


def _helpers(values: Iterable[Any]) -> Iterator[Any]:
    """The functions and classes of the tests among these values, and in those of them that are collections."""
    for value in values:
        if isinstance(value, dict):
            yield from _helpers(value.values())
        elif isinstance(value, list | tuple | set | frozenset):
            yield from _helpers(value)
        elif isinstance(value, property):
            yield from _helpers([value.fget])
        else:
            bare = _bare(value)
            if isinstance(bare, types.FunctionType | type) and bare.__module__.startswith("tests."):
                yield bare


def _bare(thing: Any) -> Any:
    """A function without its decorators: `contextmanager`, `cache`, `staticmethod`, a bound method, a `partial`."""
    while True:
        if isinstance(thing, functools.partial):
            thing = thing.func
        elif isinstance(thing, classmethod | staticmethod | types.MethodType):
            thing = thing.__func__
        else:
            return inspect.unwrap(thing) if callable(thing) else thing
