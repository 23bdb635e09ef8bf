"""The table of all QMP commands of a mount, and the commands about QMP itself (`query-commands`, `quit`, ...).

Owns the look-up, and what precedes each handler: the check of the arguments, and block jobs for images that have
appeared. Must not know what the commands of other modules do.
"""

from __future__ import annotations

from typing import Any

from qedfs.control.qmp.block_commit import commit_commands
from qedfs.control.qmp.block_nodes import node_commands
from qedfs.control.qmp.command import Arguments, Commands
from qedfs.control.qmp.errors import CommandNotFound
from qedfs.control.qmp.job_commands import job_commands
from qedfs.control.qmp.qedfs_commands import our_commands
from qedfs.control.qmp.schema import schema
from qedfs.control.qmp.session import Execute, QmpSession, negotiation
from qedfs.control.qmp.state import Call, Control

commands: Commands[Call] = Commands()


def execute(control: Control) -> Execute:
    """The function with which the sessions of this mount run a command."""

    async def run(name: str, arguments: Arguments, session: QmpSession) -> Any:  # noqa: ANN401 - what the command returns
        command = commands.get(name)
        if command is None:
            raise CommandNotFound(f"The command {name} has not been found")
        command.check(arguments)
        control.jobs.sync()
        return await command.handler(Call(control, session), arguments)

    return run


@commands("query-version")
async def _query_version(call: Call, _: Arguments) -> dict[str, Any]:
    return call.control.version()


@commands("query-name")
async def _query_name(call: Call, _: Arguments) -> dict[str, Any]:
    return {"name": call.control.mount.mountpoint}


@commands("query-commands")
async def _query_commands(call: Call, _: Arguments) -> list[dict[str, str]]:
    return [{"name": name} for name in sorted([*negotiation, *commands])]


@commands("query-qmp-schema")
async def _query_qmp_schema(call: Call, _: Arguments) -> list[dict[str, Any]]:
    return schema([*negotiation.values(), *commands.values()])


@commands("quit")
async def _quit(call: Call, _: Arguments) -> dict[str, Any]:
    call.session.after_reply = call.control.mount.quit
    return {}


for _table in (job_commands, commit_commands, node_commands, our_commands):
    commands.update(_table)
