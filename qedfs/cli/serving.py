"""The process that serves a mount: from the arguments to the mount's end, with bars, remarks and the log.

Owns how arguments become the settings of a server, and what the user sees of it. Must not know how requests are
answered, nor when a server ends (`mount/server.py`). Imports FUSE, libcurl and trio, which take longer to load than all
else that a command does; so `cli/commands/mount.py` imports this module after it knows that its own process serves.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING

import trio

from qedfs.cli import logs
from qedfs.cli.credentials_option import credentials
from qedfs.cli.daemon import Readiness
from qedfs.cli.exit_status import explain
from qedfs.cli.mount_arguments import MountArguments
from qedfs.cli.option_types import parse_source_errors
from qedfs.cli.profile_file import read_profile
from qedfs.cli.ui.output import console
from qedfs.control.monitoring.metrics_address import parse_address
from qedfs.control.port import Mounted
from qedfs.host.runtime import journal_folder
from qedfs.image.write_gate import Writes
from qedfs.jobs.rules import Rules, parse_between, parse_delay
from qedfs.mount.clock import LoopClock
from qedfs.mount.held import HolderLink
from qedfs.mount.options import Options
from qedfs.mount.server import Settings, serve
from qedfs.source.pinning import By, Pinning
from qedfs.source.policy import Policy

if TYPE_CHECKING:
    from rich.console import Console

log = logging.getLogger(__name__)

MOST_REMARKS = 5  # lines about single overlays that a mount prints before it only counts the others
NOT_WRITABLE = "is not writable; it is served read-only, and nothing that is fetched is kept"


def serve_mount(arguments: MountArguments, ready_fd: int | None, holder_fd: int | None) -> None:
    """Serve until the mount ends. Raises what ended it.

    `ready_fd`: this process is a daemon, and its parent waits for a report at this pipe. `holder_fd`: this process was
    started by the holder of the mount, which is at the other end of this socket.
    """
    readiness = Readiness(ready_fd)
    link = HolderLink(holder_fd)
    if ready_fd is not None:
        # The daemon must not keep the user's working directory busy.
        os.chdir("/")
    try:
        _serve(arguments, readiness, link)
    except BaseException as exc:
        line, exit_code = explain(exc)
        readiness.failed(line, exit_code)
        link.finish(f"failed {line}")
        raise


def _serve(arguments: MountArguments, readiness: Readiness, link: HolderLink) -> None:
    # Bars need a terminal. Without one, as in a daemon, the library that draws them is not loaded.
    terminal = console(stderr=True) if sys.stderr.isatty() and not arguments.log_json else None
    bars = terminal if terminal is not None and terminal.is_terminal else None
    logs.set_up(verbose=arguments.verbose, as_json=arguments.log_json, bars=bars)
    trio.run(_serve_with_bars, arguments, readiness, link, bars, clock=LoopClock())


def _rules(arguments: MountArguments) -> Rules:
    return Rules(
        quiet=arguments.stream == "idle",
        between=None if arguments.stream_between is None else parse_between(arguments.stream_between),
        delay=(0.0, 0.0) if arguments.stream_delay is None else parse_delay(arguments.stream_delay),
    )


def _remarks(mounted: Mounted, arguments: MountArguments) -> list[str]:
    """What to tell the user once the mount serves. `mount --daemon` prints it, because the daemon logs to a file."""
    found = mounted.everything()
    if not found:
        return [f"{arguments.source}: has no overlay (*.qed) yet; any that appears will be served"]
    lines = [
        text if (text := str(served.error)).startswith(served.path) else f"{served.path}: {text}"
        for served in found
        if served.error is not None
    ]
    images = [(served.path, served.image) for served in found if served.image is not None]
    if not arguments.read_only:
        lines += [f"{path}: {NOT_WRITABLE}" for path, image in images if not image.writable]
    lines += [f"{path}: {image.journal_remark}" for path, image in images if image.journal_remark]
    most = MOST_REMARKS if len(lines) > MOST_REMARKS + 1 else len(lines)
    more = [f"and {len(lines) - most} more such overlays: see qedfs status"] if most < len(lines) else []
    return [*lines[:most], *more]


async def _serve_with_bars(
    arguments: MountArguments, readiness: Readiness, link: HolderLink, terminal: Console | None
) -> None:
    rule = arguments.on_source_error
    settings = Settings(
        source=arguments.source,
        mountpoint=arguments.mountpoint,
        options=Options(
            stream=arguments.stream != "off",
            rules=_rules(arguments),
            read_only=arguments.read_only,
            copy_on_read=arguments.copy_on_read,
            standby=arguments.standby,
            standby_writes=Writes(arguments.standby_writes),
            limit=arguments.limit,
            limit_total=arguments.limit_total,
            profile=() if arguments.profile is None else read_profile(arguments.profile),
            policy=Policy(arguments.allow_backing),
            pinning=Pinning(By(arguments.pin), arguments.identity),
            credentials=credentials(arguments.credentials),
            deadline_seconds=arguments.source_timeout,
            on_source_error=None if rule is None else parse_source_errors(rule),
            journal_folder=journal_folder(),
        ),
        allow_other=arguments.allow_other,
        until_streamed=arguments.until_streamed,
        metrics=None if arguments.metrics is None else parse_address(arguments.metrics),
    )
    async with trio.open_nursery() as nursery:

        def ready(mounted: Mounted) -> None:
            remarks = _remarks(mounted, arguments)
            readiness.ready(remarks)
            if not mounted.everything():
                log.warning("%s", *remarks)
            if terminal is not None:
                nursery.start_soon(_draw, mounted, terminal)

        await serve(settings, ready, link)
        nursery.cancel_scope.cancel()


async def _draw(mounted: Mounted, terminal: Console) -> None:
    """Draw the bars. A bug, or a terminal that was closed, must not end the mount."""
    from qedfs.cli.ui.progress import Bars  # here, as rich takes as long to load as a mount without bars to start

    try:
        await Bars(mounted, terminal).run()
    except Exception:
        log.exception("the progress bars have failed")
