"""Turns the parameter values of a command back into arguments, so that another process can run the same command.

Derived from the command's own list of parameters, so that a new option cannot be forgotten. Pure; must not know which
command it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import click


def arguments_for(command: click.Command, values: Mapping[str, object]) -> list[str]:
    """The arguments from which `command` gets these values of its parameters. A value of None needs no argument."""
    options = [one for one in command.params if isinstance(one, click.Option)]
    words = [word for option in options if option.name in values for word in _spelled(option, values[option.name])]
    places = [str(values[one.name]) for one in command.params if isinstance(one, click.Argument) and one.name in values]
    return [*words, "--", *places]


def _spelled(option: click.Option, value: object) -> Iterator[str]:
    if value is None:
        return  # the option was not given
    if option.is_flag:
        yield from (option.opts if value else option.secondary_opts)[:1]
    elif isinstance(value, tuple):
        yield from (f"{option.opts[0]}={one}" for one in value)
    else:
        yield f"{option.opts[0]}={value}"
