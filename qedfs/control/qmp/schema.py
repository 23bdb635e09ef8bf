"""`query-qmp-schema`: commands, arguments and events, for clients that check what is available before they use it.

Owns the encoding and the table of events, which is kept by hand: it has to list every event that a module of this
folder emits. Must not know what a command does. Every return type is `any`: clients look up commands and arguments
here, not results.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from qedfs.control.qmp.command import Arg, Command

_BUILTIN = {"string": "str", "integer": "int", "boolean": "bool"}
_JSON_TYPES = {"str": "string", "int": "int", "bool": "boolean", "number": "number", "any": "value"}
_EVENTS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "JOB_STATUS_CHANGE": (("id", "str"), ("status", "str")),
    "BLOCK_JOB_COMPLETED": (
        *(("type", "str"), ("device", "str"), ("len", "int"), ("offset", "int"), ("speed", "int"), ("error", "str")),
    ),
    "BLOCK_JOB_CANCELLED": (("type", "str"), ("device", "str"), ("len", "int"), ("offset", "int"), ("speed", "int")),
    "BLOCK_JOB_ERROR": (("device", "str"), ("operation", "str"), ("action", "str")),
    "BLOCK_JOB_PENDING": (("type", "str"), ("id", "str")),
    "X_QEDFS_SOURCE_AWAY": (("device", "str"), ("backing", "str"), ("since", "number"), ("error", "str")),
    "X_QEDFS_SOURCE_BACK": (("device", "str"), ("backing", "str"), ("since", "number")),
    "X_QEDFS_RELEASED": (("device", "str"), ("overlay", "str")),
}
_OPTIONAL_IN_EVENTS = frozenset({"error"})


def schema(commands: Iterable[Command[Any]]) -> list[dict[str, Any]]:
    """A list of SchemaInfo (qapi/introspect.json)."""
    found: list[dict[str, Any]] = [
        {"name": name, "meta-type": "builtin", "json-type": json_type} for name, json_type in _JSON_TYPES.items()
    ]
    found += [
        {"name": "[any]", "meta-type": "array", "element-type": "any"},
        {"name": "[str]", "meta-type": "array", "element-type": "str"},
    ]
    for command in commands:
        found += _command(command)
    for name, members in _EVENTS.items():
        arguments = f"q_obj_{name}-arg"
        found.append({"name": name, "meta-type": "event", "arg-type": arguments})
        found.append(_object(arguments, [_member(key, kind, key in _OPTIONAL_IN_EVENTS) for key, kind in members]))
    return found


def _command(command: Command[Any]) -> Iterable[dict[str, Any]]:
    arguments = f"q_obj_{command.name}-arg"
    yield {
        "name": command.name,
        "meta-type": "command",
        "arg-type": arguments,
        "ret-type": "any",
        "allow-oob": False,
    }
    yield _object(arguments, [_member(arg.name, _type(command, arg), arg.optional) for arg in command.args])
    for arg in command.args:
        if isinstance(arg.kind, tuple):
            yield {"name": _type(command, arg), "meta-type": "enum", "values": list(arg.kind)}


def _type(command: Command[Any], arg: Arg) -> str:
    if isinstance(arg.kind, tuple):
        return f"q_enum_{command.name}-{arg.name}"
    return _BUILTIN.get(arg.kind, "[str]")


def _member(name: str, kind: str, optional: bool) -> dict[str, Any]:
    # A default of null is how introspection spells "optional".
    return {"name": name, "type": kind, **({"default": None} if optional else {})}


def _object(name: str, members: list[dict[str, Any]]) -> dict[str, Any]:
    return {"name": name, "meta-type": "object", "members": members}
