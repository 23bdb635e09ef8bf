"""`qedfs wait`: returns when all images have reached a goal, such as being complete.

Owns the options and their help. `cli/plain/wait.py` waits, also for callers without click. Must not ask a server.
"""

from __future__ import annotations

import click

from qedfs.cli.completion import images, mountpoints
from qedfs.cli.given_once import GivenOnce
from qedfs.cli.option_types import DURATION, PLACE
from qedfs.cli.plain.wait import USUAL_GOAL
from qedfs.cli.plain.wait import wait as run


@click.command(cls=GivenOnce, short_help="Wait until images are complete.")
@click.argument("mountpoint", type=PLACE, required=False, shell_complete=mountpoints)
@click.argument("image", required=False, shell_complete=images)
@click.option("--timeout", type=DURATION, metavar="TIME", help="Give up after this time, with exit code 7.")
@click.option(
    "--for",
    "goal",
    default=USUAL_GOAL,
    show_default=True,
    metavar="complete|populated:RANGE|unused",
    help="What to wait for. RANGE is START-END, like 0-64M: these bytes are local. unused: nobody has the image open.",
)
@click.option(
    "--overlay",
    "place",
    type=PLACE,
    metavar="OVERLAY|FOLDER",
    help="What was mounted. If the mount has ended, as after mount --until-streamed, the files themselves are checked.",
)
@click.option("--quiet", "-q", is_flag=True, help="Print no progress and no remarks, only errors.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end, also after a failure.")
def wait(
    mountpoint: str | None,
    image: str | None,
    timeout: float | None,
    goal: str,
    place: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Wait until IMAGE, or every image, of the mount at MOUNTPOINT is complete: the source is no longer needed.

    Overlays that have just appeared in the folder count. An unreachable source or a full disk does not end the wait. A
    failed stream ends it with exit code 4, a changed source with 5. If nothing is mounted there (any more), the exit
    code is 10; but with --overlay it is 0 if what was mounted is complete. MOUNTPOINT may be omitted if this user has a
    single mount (qedfs list).

    On a terminal, bars show the progress. Otherwise a line on standard error does, after each tenth of the whole, and
    every ten seconds if there is progress.
    """
    run(mountpoint, image, timeout=timeout, goal=goal, place=place, quiet=quiet, as_json=as_json)
