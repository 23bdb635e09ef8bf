"""qedfs as a contender: overlays made, mounted and streamed through its command line and its control socket."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from tests.harness.mounts import Mount, mounted, qedfs

from .lab import Lab, Origin
from .qmp import Qmp
from .usage import Meter
from .values import Outcome

STREAM_SECONDS = 300.0


def create(overlay: Path, backing: str) -> Path:
    """`qedfs create` of an overlay over a raw backing."""
    qedfs("create", overlay, "--backing", backing, "--backing-format", "raw")
    return overlay


@contextlib.contextmanager
def served(lab: Lab, source: Path, *options: str, stream: bool = False) -> Iterator[Mount]:
    """A mount of an overlay, or of a folder of them; `stream`: the stream begins with it, as it does for a user."""
    with mounted(source, lab.fresh("mnt"), *options, *([] if stream else ["--no-stream"])) as mount:
        lab.prefer(mount.pid)
        yield mount


def image_path(mount: Mount, overlay: Path) -> Path:
    """Where an overlay is served."""
    return mount.path(f"{overlay.stem}.raw")


@contextlib.contextmanager
def cold(lab: Lab, origin: Origin, *options: str, stream: bool = False) -> Iterator[tuple[Mount, Path]]:
    """A mount of a new, empty overlay over `origin`, and the path of its image; both are gone afterwards."""
    overlay = create(lab.fresh("ours.qed"), origin.url)
    lab.settle()
    origin.traffic.forget()
    try:
        with served(lab, overlay, *options, stream=stream) as mount:
            yield mount, image_path(mount, overlay)
    finally:
        overlay.unlink()


def fill(lab: Lab, origin: Origin) -> Outcome:
    """block-stream of the whole of `origin` into a new overlay, from the command to the completed job."""
    with cold(lab, origin) as (mount, image):
        with Qmp(Path(mount.status()["socket"])) as qmp:
            meter = Meter(mount.pid)
            qmp.execute("block-stream", device=image.stem)
            qmp.wait_for_jobs(1, STREAM_SECONDS)
            seconds, figures = meter.read(origin.size)
        return Outcome(origin.size / seconds / 1e6, figures | origin.traffic.figures(origin.size))
