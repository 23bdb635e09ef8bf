"""`qedfs mount`: options -> settings, then the mount, in the foreground or as a daemon."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import click
import trio
from rich.console import Console

from qedfs.cli import daemon, logs
from qedfs.cli.faults import explain
from qedfs.cli.mountoptions import expand
from qedfs.cli.output import console
from qedfs.cli.progress import Bars
from qedfs.cli.values import DURATION, SIZE
from qedfs.control.port import Mounted
from qedfs.errors import UsageError


class MountCommand(click.Command):
    """A command that also takes its options as `-o key=value,...`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Spell `-o` out first."""
        return super().parse_args(ctx, expand(args))


@dataclasses.dataclass(frozen=True, slots=True)
class MountArguments:
    """The options as the user gave them. The names are those of the long options."""

    source: str
    mountpoint: str
    stream: bool
    copy_on_read: bool | None
    limit: int
    until_streamed: bool
    allow_backing: tuple[str, ...]
    allow_other: bool
    source_timeout: float
    log_json: bool
    verbose: bool

    def command_line(self) -> list[str]:
        """The arguments that say the same again."""
        words = [f"--limit={self.limit}", f"--source-timeout={self.source_timeout}"]
        words += [f"--allow-backing={prefix}" for prefix in self.allow_backing]
        if self.copy_on_read is not None:
            words.append("--copy-on-read" if self.copy_on_read else "--no-copy-on-read")
        if not self.stream:
            words.append("--no-stream")
        flags = ("until_streamed", "allow_other", "log_json", "verbose")
        words += [f"--{name.replace('_', '-')}" for name in flags if getattr(self, name)]
        return [*words, "--", self.source, self.mountpoint]


@click.command(cls=MountCommand, short_help="Serve overlays as raw files.")
@click.argument("source", type=click.Path())
@click.argument("mountpoint", type=click.Path())
@click.option("--daemon", "in_background", is_flag=True, help="Return as soon as the mount serves; it goes on behind.")
@click.option("--no-stream", "stream", flag_value=False, default=True, help="Fetch only what is read, until told else.")
@click.option(
    "--copy-on-read/--no-copy-on-read",
    default=None,
    help="Keep what is fetched for a reader, or not; without this option each overlay decides.",
)
@click.option("--limit", type=SIZE, default=0, metavar="SIZE", help="Stream at most SIZE bytes per second and image.")
@click.option("--until-streamed", is_flag=True, help="Unmount when every overlay is complete and no image is open.")
@click.option(
    "--allow-backing",
    multiple=True,
    metavar="PREFIX",
    help="Allow backings below this URL, folder or socket, and no others; repeatable. Without it: any http, https and "
    "nbd server, no local files.",
)
@click.option("--allow-other", is_flag=True, help="Let other users read the images, as their modes say.")
@click.option(
    "--source-timeout",
    type=DURATION,
    default=30.0,
    show_default="30s",
    help="A read fails when the source gives nothing in this time, retries included.",
)
@click.option("--log-json", is_flag=True, help="Log one JSON object per line.")
@click.option("--verbose", is_flag=True, help="Log more.")
@click.option("--ready-fd", type=int, hidden=True)
def mount(in_background: bool, ready_fd: int | None, **options: Any) -> None:  # noqa: ANN401 - MountArguments' fields
    """Serve SOURCE, one overlay or a folder of them, at the folder MOUNTPOINT.

    disk.qed appears as MOUNTPOINT/disk.raw, and can be read and written at once. What is missing is fetched from the
    overlay's backing when it is read; meanwhile the rest streams in.

    Runs until it is unmounted (qedfs umount) or interrupted. `-o limit=20M,allow_other,...` is another way to write
    the options.
    """
    arguments = MountArguments(**_absolute(options))
    if arguments.until_streamed and not arguments.stream:
        raise UsageError("--until-streamed would wait for ever under --no-stream; give one of them")
    if in_background:
        daemon.start(arguments.command_line(), arguments.mountpoint)
        return
    readiness = daemon.Readiness(ready_fd)
    if ready_fd is not None:
        # The folder that the user stood in must not be kept busy.
        os.chdir("/")
    try:
        _serve(arguments, readiness)
    except BaseException as exc:
        readiness.failed(*explain(exc))
        raise


def _absolute(options: dict[str, Any]) -> dict[str, Any]:
    prefixes = tuple(p if "://" in p else os.path.abspath(p) for p in options["allow_backing"])
    places = {name: os.path.abspath(options[name]) for name in ("source", "mountpoint")}
    return {**options, **places, "allow_backing": prefixes}


def _serve(arguments: MountArguments, readiness: daemon.Readiness) -> None:
    terminal = console(stderr=True)
    bars = terminal if terminal.is_terminal and not arguments.log_json else None
    logs.set_up(verbose=arguments.verbose, as_json=arguments.log_json, bars=bars)
    trio.run(_serve_with_bars, arguments, readiness, bars)


async def _serve_with_bars(arguments: MountArguments, readiness: daemon.Readiness, terminal: Console | None) -> None:
    # Imported here: of all commands only this one needs FUSE and libcurl, which take their time.
    from qedfs.mount.daemon import Settings, serve
    from qedfs.mount.folder import Options
    from qedfs.runtime import journal_folder
    from qedfs.source.policy import Policy

    settings = Settings(
        source=arguments.source,
        mountpoint=arguments.mountpoint,
        options=Options(
            stream=arguments.stream,
            copy_on_read=arguments.copy_on_read,
            limit=arguments.limit,
            policy=Policy(arguments.allow_backing),
            deadline_seconds=arguments.source_timeout,
            journal_folder=journal_folder(),
        ),
        allow_other=arguments.allow_other,
        until_streamed=arguments.until_streamed,
    )
    async with trio.open_nursery() as nursery:

        def ready(mounted: Mounted) -> None:
            readiness.ready()
            if terminal is not None:
                nursery.start_soon(Bars(mounted, terminal).run)

        await serve(settings, ready)
        nursery.cancel_scope.cancel()
