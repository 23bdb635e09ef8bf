"""A QMP command: a name, typed arguments, a handler. Checks requests, with QEMU's error messages.

Owns the checks of a request before its handler runs. Must not know any particular command.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from qedfs.control.qmp.errors import QmpError

C = TypeVar("C")
Arguments = Mapping[str, Any]
Handler = Callable[[C, Arguments], Awaitable[Any]]

INT64 = range(-(1 << 63), 1 << 63)
_REQUEST_KEYS = frozenset({"execute", "arguments", "id"})


@dataclasses.dataclass(frozen=True, slots=True)
class Arg:
    """One argument. `kind`: "string", "integer", "boolean", "array", or the values of an enumeration."""

    name: str
    kind: str | tuple[str, ...] = "string"
    optional: bool = False

    def check(self, value: Any) -> None:  # noqa: ANN401 - whatever a client sends
        """Raise QmpError unless the value is of this argument's type."""
        if isinstance(self.kind, tuple):
            if not isinstance(value, str):
                self._refuse("string")
            if value not in self.kind:
                raise QmpError(f"Parameter '{self.name}' does not accept value '{value}'")
        elif self.kind == "integer":
            # To Python, True is an integer.
            if not isinstance(value, int) or isinstance(value, bool) or value not in INT64:
                self._refuse("integer")
        elif not isinstance(value, _TYPES[self.kind]):
            self._refuse(self.kind)

    def _refuse(self, expected: str) -> None:
        raise QmpError(f"Invalid parameter type for '{self.name}', expected: {expected}")


_TYPES: Mapping[str, type] = {"string": str, "boolean": bool, "array": list}


@dataclasses.dataclass(frozen=True, slots=True)
class Command(Generic[C]):
    """A command whose handler gets a context `C`."""

    name: str
    args: Sequence[Arg]
    handler: Handler[C]

    def check(self, arguments: Arguments) -> None:
        """Raise QmpError for a missing, mistyped or unknown argument, in the order in which QEMU checks."""
        for arg in self.args:
            if arg.name in arguments:
                arg.check(arguments[arg.name])
            elif not arg.optional:
                raise QmpError(f"Parameter '{arg.name}' is missing")
        known = {arg.name for arg in self.args}
        for name in arguments:
            if name not in known:
                raise QmpError(f"Parameter '{name}' is unexpected")


class Commands(dict[str, Command[C]]):
    """Commands by name. Calling it gives the decorator that registers a handler."""

    def __call__(self, name: str, *args: Arg) -> Callable[[Handler[C]], Handler[C]]:
        """Register a handler."""

        def register(handler: Handler[C]) -> Handler[C]:
            self[name] = Command(name, args, handler)
            return handler

        return register


def parse_request(message: Any) -> tuple[str, dict[str, Any]]:  # noqa: ANN401 - whatever a client sends
    """(name, arguments) of a request. Raises QmpError if the message is not a request."""
    if not isinstance(message, dict):
        raise QmpError("QMP input must be a JSON object")
    for key in message:
        if key not in _REQUEST_KEYS:
            raise QmpError(f"QMP input member '{key}' is unexpected")
    if "execute" not in message:
        raise QmpError("QMP input lacks member 'execute'")
    name, arguments = message["execute"], message.get("arguments", {})
    if not isinstance(name, str):
        raise QmpError("QMP input member 'execute' must be a string")
    if not isinstance(arguments, dict):
        raise QmpError("QMP input member 'arguments' must be an object")
    return name, arguments
