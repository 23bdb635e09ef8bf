"""The QMP commands of a mount that are not about jobs, and the table of all of them."""

from __future__ import annotations

import dataclasses
from typing import Any

from qedfs.control.command import Arguments, Commands
from qedfs.control.session import Execute, Session, check_command
from qedfs.control.state import Control
from qedfs.control.status import mount_status


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """Who asks whom."""

    control: Control
    session: Session


commands: Commands[Request] = Commands()


def execute(control: Control) -> Execute:
    """How the sessions of this mount run a command."""

    async def run(name: str, arguments: Arguments, session: Session) -> Any:  # noqa: ANN401 - what the command returns
        command = check_command(commands, name, arguments)
        return await command.handler(Request(control, session), arguments)

    return run


@commands("query-version")
async def _query_version(request: Request, _: Arguments) -> dict[str, Any]:
    return request.control.version()


@commands("query-commands")
async def _query_commands(request: Request, _: Arguments) -> list[dict[str, str]]:
    return [{"name": name} for name in sorted(["qmp_capabilities", *commands])]


@commands("quit")
async def _quit(request: Request, _: Arguments) -> dict[str, Any]:
    request.session.after_reply = request.control.mount.quit
    return {}


@commands("x-qedfs-status")
async def _status(request: Request, _: Arguments) -> dict[str, Any]:
    control = request.control
    return mount_status(control.mount, control.socket, control.rates)
