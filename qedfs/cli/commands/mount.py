"""`qedfs mount`: serves overlays, in the foreground or as a daemon. Turns the options into settings."""

from __future__ import annotations

import dataclasses
import logging
import os
from typing import Any

import click
import trio
from rich.console import Console

from qedfs.cli import daemon, logs
from qedfs.cli.command_line import arguments_for
from qedfs.cli.commands.profile import read_profile
from qedfs.cli.credentials_option import credentials, credentials_option
from qedfs.cli.exit_status import explain
from qedfs.cli.given_once import GivenOnce
from qedfs.cli.mount_checks import check_options, check_source, remarks
from qedfs.cli.mount_options import expand
from qedfs.cli.option_types import DURATION, PLACE, RATE, Checked
from qedfs.cli.pin_options import pin_options
from qedfs.cli.ui.output import console, remark
from qedfs.cli.ui.progress import Bars
from qedfs.control.monitoring.metrics_server import parse_address
from qedfs.control.port import Mounted
from qedfs.jobs.idle import Rules, parse_between, parse_delay
from qedfs.mount.clock import LoopClock
from qedfs.source.url import without_login

log = logging.getLogger(__name__)

MOST_REMARKS = 5  # lines about single overlays that a mount prints before it only counts the others
NOT_WRITABLE = "is not writable; it is served read-only, and nothing that is fetched is kept"


class MountCommand(GivenOnce):
    """A command that also takes its options as `-o key=value,...`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Expand `-o` and short forms, then parse."""
        return super().parse_args(ctx, expand(args))


@dataclasses.dataclass(frozen=True, slots=True)
class MountArguments:
    """The parameters of `mount` under click's names, with absolute paths.

    Without --daemon and --ready-fd, which concern only the process that they are given to.
    """

    source: str
    mountpoint: str
    read_only: bool
    stream: str  # eager, idle or off
    copy_on_read: bool | None
    stream_between: str | None
    stream_delay: str | None
    limit: int
    limit_total: int
    profile: str | None
    until_streamed: bool
    allow_backing: tuple[str, ...]
    credentials: str | None
    allow_other: bool
    metrics: str | None
    source_timeout: float
    pin: str
    identity: str | None
    log_json: bool
    verbose: bool

    def rules(self) -> Rules:
        """The rules for when streams hold off."""
        return Rules(
            quiet=self.stream == "idle",
            between=None if self.stream_between is None else parse_between(self.stream_between),
            delay=(0.0, 0.0) if self.stream_delay is None else parse_delay(self.stream_delay),
        )


@click.command(cls=MountCommand, short_help="Serve overlays as raw files.")
@click.argument("source", type=PLACE)
@click.argument("mountpoint", type=PLACE)
@click.option(
    "--daemon",
    "in_background",
    is_flag=True,
    help="Return once the mount serves; it continues in the background. Its log is next to its control socket "
    "(status --json).",
)
@click.option(
    "--read-only",
    is_flag=True,
    help="The images cannot be written to, and the overlays stay unchanged: nothing that is fetched is kept.",
)
@click.option(
    "--stream",
    type=click.Choice(["eager", "idle", "off"]),
    default="eager",
    show_default=True,
    help="When to fetch what nobody has read: at once; while guests and the machine are idle; never.",
)
@click.option("--no-stream", is_flag=True, expose_value=False, help="The same as --stream off.")  # see mount_options.py
@click.option(
    "--stream-between",
    type=Checked(parse_between),
    metavar="HH:MM-HH:MM",
    help="Stream only between these times of the day.",
)
@click.option(
    "--stream-delay", type=Checked(parse_delay), metavar="TIME[-TIME]", help="Start to stream TIME after the mount."
)
@click.option(
    "--copy-on-read/--no-copy-on-read",
    default=None,
    help="Whether to keep what is fetched for readers. Default: as recorded in each overlay.",
)
@click.option(
    "--limit",
    type=RATE,
    default=0,
    metavar="SIZE",
    help="Each image keeps at most SIZE bytes per second in the background, whichever image fetches them. What its "
    "readers ask for does not count.",
)
@click.option(
    "--limit-total",
    type=RATE,
    default=0,
    metavar="SIZE",
    help="All images together fetch at most SIZE bytes per second in the background, each as much as the others.",
)
@click.option(
    "--profile",
    type=PLACE,
    metavar="FILE",
    help="Fetch the ranges in FILE first: those that readers of such an image waited for (qedfs profile).",
)
@click.option("--until-streamed", is_flag=True, help="Unmount when every overlay is complete and no image is open.")
@click.option(
    "--allow-backing",
    multiple=True,
    metavar="PREFIX",
    help="Allow backings below this URL, folder or socket, and no others; repeatable. Without it: any http, https and "
    "nbd server, no local files.",
)
@credentials_option
@click.option("--allow-other", is_flag=True, help="Let other users access the images, subject to the file modes.")
@click.option(
    "--source-timeout",
    type=DURATION,
    default="30s",
    show_default=True,
    help="A read fails if the source does not deliver within this time, retries included.",
)
@pin_options
@click.option(
    "--metrics",
    type=Checked(parse_address),
    metavar="[ADDRESS:]PORT|unix:PATH",
    help="Serve Prometheus metrics there, under /metrics; without an address, to this machine only.",
)
@click.option("--log-json", is_flag=True, help="Log one JSON object per line.")
@click.option("--verbose", is_flag=True, help="Log more.")
@click.option("--ready-fd", type=int, hidden=True)
def mount(in_background: bool, ready_fd: int | None, **options: Any) -> None:  # noqa: ANN401 - MountArguments' fields
    """Serve SOURCE, one overlay or a folder of them, at the folder MOUNTPOINT.

    disk.qed appears as MOUNTPOINT/disk.raw, and can be read and written at once. Missing parts are fetched from the
    overlay's backing when they are read; meanwhile the rest is streamed in.

    --stream-delay also takes a range like 30s-2m. Each mount picks a random delay from it, so that the machines of a
    fleet do not all start at once.

    --read-only, or -o ro, opens the overlays read-only: there is no copy-on-read and no stream, and several such
    mounts, and QEMU, can read one overlay at the same time.

    Runs until unmounted (qedfs umount) or interrupted; a second signal ends it at once, without a flush. SIGUSR1 logs
    what it is doing. The options can also be written as `-o limit=20M,allow_other,...`.
    """
    if ready_fd is None:
        check_source(options["source"], options["mountpoint"])
    arguments = MountArguments(**_absolute(options))
    check_options(arguments)
    if ready_fd is None:
        for line in remarks(arguments):
            remark(line)
    if in_background:
        daemon.start(arguments_for(mount, dataclasses.asdict(arguments)), arguments.mountpoint)
        return
    readiness = daemon.Readiness(ready_fd)
    if ready_fd is not None:
        # The daemon must not keep the user's working directory busy.
        os.chdir("/")
    try:
        _serve(arguments, readiness)
    except BaseException as exc:
        readiness.failed(*explain(exc))
        raise


def _absolute(options: dict[str, Any]) -> dict[str, Any]:
    """Make paths absolute, and complete the address for metrics. The daemon has another working directory.

    Its arguments can be read by everybody, so a login in a URL, which allows nothing more, is not among them.
    """
    prefixes = tuple(without_login(p) if "://" in p else os.path.abspath(p) for p in options["allow_backing"])
    named = [one.name for one in mount.params if isinstance(one.type, click.Path) and one.name is not None]
    places = {name: os.path.abspath(options[name]) for name in named if options[name] is not None}
    metrics = None if options["metrics"] is None else str(parse_address(options["metrics"]))
    return {**options, **places, "allow_backing": prefixes, "metrics": metrics}


def _serve(arguments: MountArguments, readiness: daemon.Readiness) -> None:
    terminal = console(stderr=True)
    bars = terminal if terminal.is_terminal and not arguments.log_json else None
    logs.set_up(verbose=arguments.verbose, as_json=arguments.log_json, bars=bars)
    trio.run(_serve_with_bars, arguments, readiness, bars, clock=LoopClock())


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


async def _serve_with_bars(arguments: MountArguments, readiness: daemon.Readiness, terminal: Console | None) -> None:
    # Imported here because loading FUSE and libcurl is slow, and only this command needs both.
    from qedfs.host.runtime import journal_folder
    from qedfs.mount.options import Options
    from qedfs.mount.server import Settings, serve
    from qedfs.source.pinning import By, Pinning
    from qedfs.source.policy import Policy

    settings = Settings(
        source=arguments.source,
        mountpoint=arguments.mountpoint,
        options=Options(
            stream=arguments.stream != "off",
            rules=arguments.rules(),
            read_only=arguments.read_only,
            copy_on_read=arguments.copy_on_read,
            limit=arguments.limit,
            limit_total=arguments.limit_total,
            profile=() if arguments.profile is None else read_profile(arguments.profile),
            policy=Policy(arguments.allow_backing),
            pinning=Pinning(By(arguments.pin), arguments.identity),
            credentials=credentials(arguments.credentials),
            deadline_seconds=arguments.source_timeout,
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
                nursery.start_soon(_draw, Bars(mounted, terminal))

        await serve(settings, ready)
        nursery.cancel_scope.cancel()


async def _draw(bars: Bars) -> None:
    """Draw the bars. A bug, or a terminal that was closed, must not end the mount."""
    try:
        await bars.run()
    except Exception:
        log.exception("the progress bars have failed")
