"""Asks a mount what a job of an image would do, part by part: `--dry-run` of a mounted image.

Owns the walk over the image. Must not know what the figures mean.
"""

from __future__ import annotations

import time
from typing import Any

from qedfs.cli.served_images import Image, check_served, fetch
from qedfs.cli.takeovers import lasting_client
from qedfs.cli.ui.output import remark

REMARK_SECONDS = 10.0


def looked_at(mountpoint: str, name: str, kind: str, *, quiet: bool) -> tuple[Image, list[dict[str, Any]]]:
    """The status of the image, and what the mount says of each part of it, in order. At least one.

    `kind`: of the job. `quiet`: do not say how far it is. Raises the error with which the job would not begin.
    """
    parts = []
    with lasting_client(mountpoint) as client:
        image = fetch(client, name, mountpoint)[0]
        check_served(image)
        pos: int | None = 0
        said = time.monotonic()
        while pos is not None:
            parts.append(client.execute("x-qedfs-dry-run", device=image["name"], type=kind, offset=pos))
            pos = parts[-1]["next"]
            if pos is not None and not quiet and time.monotonic() - said >= REMARK_SECONDS:
                said = time.monotonic()
                remark(f"{image['name']}: {100 * pos // image['size']}%")
    return image, parts
