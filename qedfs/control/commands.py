"""The table of all QMP commands of a mount, and those that are about the monitor itself."""

from __future__ import annotations

from typing import Any

from qedfs.control.command import Arguments, Commands
from qedfs.control.faults import CommandNotFound
from qedfs.control.jobcommands import job_commands
from qedfs.control.nodes import node_commands
from qedfs.control.ourcommands import our_commands
from qedfs.control.schema import schema
from qedfs.control.session import Execute, Session, negotiation
from qedfs.control.state import Control, Request

commands: Commands[Request] = Commands()


def execute(control: Control) -> Execute:
    """How the sessions of this mount run a command."""

    async def run(name: str, arguments: Arguments, session: Session) -> Any:  # noqa: ANN401 - what the command returns
        command = commands.get(name)
        if command is None:
            raise CommandNotFound(f"The command {name} has not been found")
        command.check(arguments)
        control.jobs.sync()
        return await command.handler(Request(control, session), arguments)

    return run


@commands("query-version")
async def _query_version(request: Request, _: Arguments) -> dict[str, Any]:
    return request.control.version()


@commands("query-name")
async def _query_name(request: Request, _: Arguments) -> dict[str, Any]:
    return {"name": request.control.mount.mountpoint}


@commands("query-commands")
async def _query_commands(request: Request, _: Arguments) -> list[dict[str, str]]:
    return [{"name": name} for name in sorted([*negotiation, *commands])]


@commands("query-qmp-schema")
async def _query_qmp_schema(request: Request, _: Arguments) -> list[dict[str, Any]]:
    return schema([*negotiation.values(), *commands.values()])


@commands("quit")
async def _quit(request: Request, _: Arguments) -> dict[str, Any]:
    request.session.after_reply = request.control.mount.quit
    return {}


for _table in (job_commands, node_commands, our_commands):
    commands.update(_table)
