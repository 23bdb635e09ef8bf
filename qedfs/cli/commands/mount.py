"""`qedfs mount`: checks the options, then serves in this process or starts the one that does.

Owns the options and their help, and which process serves. Must not know what an option does to an image
(`mount/options.py`). Must not import what only the serving process needs (`cli/serving.py`): the parent of a daemon
starts nothing but that.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import Any

import click

from qedfs.cli.command_line import arguments_for
from qedfs.cli.credentials_option import credentials_option
from qedfs.cli.given_once import GivenOnce
from qedfs.cli.mount_arguments import MountArguments
from qedfs.cli.mount_checks import check_options, check_source, remarks
from qedfs.cli.mount_options import expand
from qedfs.cli.option_types import DURATION, PLACE, RATE, Checked, parse_source_errors, source_error_words
from qedfs.cli.pin_options import pin_options
from qedfs.cli.server_command import server_command
from qedfs.cli.ui.output import remark
from qedfs.control.monitoring.metrics_address import parse_address
from qedfs.jobs.rules import parse_between, parse_delay


class MountCommand(GivenOnce):
    """A command that also takes its options as `-o key=value,...`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Expand `-o` and short forms, then parse."""
        return super().parse_args(ctx, expand(args))


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
    "--standby",
    is_flag=True,
    help="Until qedfs activate, pass reads through and keep nothing, because the source still changes: for a disk that "
    "follows a running machine. The overlay records this; an overlay that was activated stays active.",
)
@click.option(
    "--standby-writes",
    type=click.Choice(["refuse", "hold", "activate"]),
    default="refuse",
    show_default=True,
    help="What becomes of a write in standby: it fails; it waits until the image is activated; or it activates it.",
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
@click.option(
    "--on-source-error",
    type=Checked(parse_source_errors),
    metavar="eio|wait[:TIME]",
    shell_complete=source_error_words,
    help="What reads do when that time is over: fail, or wait until the source is back, for at most TIME. "
    "Default: as recorded in each overlay (qedfs source on-error).",
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
@click.option(
    "--restart/--no-restart",
    default=True,
    show_default=True,
    help="Keep the mount when its server dies: another process holds it, and starts a server that takes it over.",
)
@click.option("--most-deaths", type=click.IntRange(min=1), default=5, hidden=True)  # in a minute; for contrib/outlive
@click.option("--ready-fd", type=int, hidden=True)
@click.option("--holder-fd", type=int, hidden=True)
def mount(
    in_background: bool,
    restart: bool,
    most_deaths: int,
    ready_fd: int | None,
    holder_fd: int | None,
    **options: Any,  # noqa: ANN401 - MountArguments' fields
) -> None:
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
    is_first = ready_fd is None and holder_fd is None  # the process that the user has started
    if is_first:
        check_source(options["source"], options["mountpoint"])
    arguments = MountArguments(**_absolute(options))
    check_options(arguments)
    if is_first:
        for line in remarks(arguments, held=restart):
            remark(line)
    if in_background:
        from qedfs.cli import daemon  # here, as it loads subprocess, which takes as long as all of this module

        held = [f"--most-deaths={most_deaths}"] if restart else ["--no-restart"]
        words = [*held, *_words(arguments)]
        daemon.start(lambda fd: server_command(f"--ready-fd={fd}", *words), arguments.mountpoint)
        return
    if restart and holder_fd is None:
        holder_fd = _held(arguments, most_deaths, ready_fd)  # from here on this is another process
    from qedfs.cli.serving import serve_mount  # see above

    serve_mount(arguments, ready_fd, holder_fd)


def _held(arguments: MountArguments, most_deaths: int, ready_fd: int | None) -> int | None:
    """Leave this process to the holder, and go on in another one. Returns the socket between them, None without."""
    from qedfs.cli.holding import hold  # see above

    closed = [] if ready_fd is None else [ready_fd]  # or who waits there would not notice the end of the server
    log = _log_kind(arguments)
    found = hold(_words(arguments), arguments.mountpoint, log=log, most_deaths=most_deaths, closed=closed)
    if found is None:
        remark("there is no room for a second process, so this mount ends with its server")
    return found


def _words(arguments: MountArguments) -> list[str]:
    return arguments_for(mount, dataclasses.asdict(arguments))


def _log_kind(arguments: MountArguments) -> str:
    """How the holder writes its lines, as `logs.py` does for the server."""
    if arguments.log_json:
        return "json"
    from qedfs.cli.logs import is_journal  # here, as it loads logging, which the parent of a daemon does not need

    return "journal" if is_journal(sys.stderr) else "text"


def _absolute(options: dict[str, Any]) -> dict[str, Any]:
    """Make paths absolute, and complete the address for metrics. The daemon has another working directory.

    Its arguments can be read by everybody, so a login in a URL, which allows nothing more, is not among them.
    """
    prefixes = tuple(_without_login(p) if "://" in p else os.path.abspath(p) for p in options["allow_backing"])
    named = [one.name for one in mount.params if isinstance(one.type, click.Path) and one.name is not None]
    places = {name: os.path.abspath(options[name]) for name in named if options[name] is not None}
    metrics = None if options["metrics"] is None else str(parse_address(options["metrics"]))
    return {**options, **places, "allow_backing": prefixes, "metrics": metrics}


def _without_login(prefix: str) -> str:
    from qedfs.source.url import without_login  # here, as only this option needs it

    return without_login(prefix)
