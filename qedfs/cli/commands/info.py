"""`qedfs info`: the properties of an overlay file.

Owns the keys of `info --json`, and the same for people. Must not ask a source, nor the server of a mount: what it tells
is what the file holds.
"""

from __future__ import annotations

import os
from typing import Any

import click
import trio

from qedfs.cli.option_types import PLACE
from qedfs.cli.overlay_files import peeked
from qedfs.cli.ui.output import print_fields, print_json
from qedfs.format.record import Record
from qedfs.image.source_errors import from_stored
from qedfs.overlay.overlay import Overlay
from qedfs.source.samples import Samples
from qedfs.source.url import redact
from qedfs.units import format_seconds, format_size


@click.command(short_help="Show what an overlay is.")
@click.argument("overlay", type=PLACE)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(overlay: str, as_json: bool) -> None:
    """Show the size, the backing and the state of OVERLAY. It may be mounted meanwhile."""
    found = {"overlay": os.path.abspath(overlay), **trio.run(_info, overlay)}
    if as_json:
        print_json(found)
    else:
        print_fields(_for_people(found))


async def _info(path: str) -> dict[str, Any]:
    async with peeked(path) as overlay:
        await overlay.count_missing()
        layout = await overlay.fragments()
        rule = from_stored(overlay.record.on_source_error)
        return {
            "format": "qed",
            "size": overlay.image_size,
            "cluster_size": overlay.cluster_size,
            "table_size": overlay.geometry.table_size,
            "file_size": overlay.file_size,
            "disk_usage": overlay.disk_usage,
            "data": layout.data,
            "pieces": layout.pieces,
            "longest_piece": layout.longest,
            "backing": None if overlay.backing is None else redact(overlay.backing),
            "backing_format": None if overlay.backing is None or overlay.probes_backing else "raw",
            "complete": overlay.backing is None and overlay.damage is None,
            "damage": None if overlay.damage is None else str(overlay.damage),
            "populated": _populated(overlay),
            "copy_on_read": overlay.record.copy_on_read,
            "paused": overlay.record.paused,
            "standby": overlay.backing is not None and overlay.record.standby.waits,
            "committing": overlay.record.committing,
            "on_source_error": rule.action,
            "wait_bound_seconds": rule.bound_seconds,
            "pin": _pin(overlay.record),
        }


def _populated(overlay: Overlay) -> int:
    """Bytes of the image that need no backing."""
    if overlay.backing is None:
        return overlay.image_size
    return max(0, overlay.image_size - (overlay.missing or 0) * overlay.cluster_size)


def _pin(record: Record) -> dict[str, Any] | None:
    """The version of the source that the overlay's clusters come from."""
    if record.pin is None:
        return None
    pin = record.pin
    return {
        "size": pin.size,
        "etag": pin.etag,
        "last_modified": pin.last_modified,
        "digest": pin.published or None,
        "identity": pin.called or None,
        "sampled_blocks": len(Samples.decode(pin.samples)),
    }


def _for_people(found: dict[str, Any]) -> dict[str, Any]:
    size, populated, pin = found["size"], found["populated"], found["pin"]
    percent = 100 * populated // size if size else 100
    version = [] if pin is None else _version(pin)
    return {
        "overlay": found["overlay"],
        "size": f"{format_size(size)} ({size} bytes)",
        "damaged": found["damage"],
        "backing": found["backing"] or ("none: the overlay is complete" if found["complete"] else "none"),
        "backing is": None if found["backing"] is None else found["backing_format"] or "not said to be raw",
        "local": f"{format_size(populated)} ({percent}%)",
        "on disk": format_size(found["disk_usage"]),
        "layout": _layout(found),
        "clusters": f"{format_size(found['cluster_size'])}, tables of {found['table_size']} clusters",
        "source": f"pinned to {', '.join(filter(None, version))}" if version else None,
        "keeps": None if found["copy_on_read"] else "only what is streamed, not what readers fetch",
        "stream": "paused by the user" if found["paused"] else None,
        "standby": "keeps nothing until qedfs activate" if found["standby"] else None,
        "commit": "was interrupted; the same qedfs commit goes on" if found["committing"] else None,
        "source away": _waiting(found) if found["on_source_error"] == "wait" else None,
    }


def _layout(found: dict[str, Any]) -> str | None:
    """What a read of the whole image costs beside the reading itself: a jump to each piece."""
    data, pieces = found["data"], found["pieces"]
    if not pieces:
        return None
    if pieces == 1:
        return f"{format_size(data)} of data in one piece"
    average, longest = format_size(data // pieces), format_size(found["longest_piece"])
    return f"{format_size(data)} of data in {pieces} pieces, {average} on average, the longest {longest}"


def _waiting(found: dict[str, Any]) -> str:
    bound = found["wait_bound_seconds"]
    return "reads wait for it" if bound is None else f"reads wait for it, for {format_seconds(bound)} at most"


def _version(pin: dict[str, Any]) -> list[str | None]:
    """What identifies the pinned version, in words."""
    blocks = pin["sampled_blocks"]
    return [
        f"{pin['size']} bytes",
        pin["etag"],
        pin["last_modified"],
        pin["digest"],
        f"called {pin['identity']}" if pin["identity"] else None,
        f"{blocks} sampled block{'s' if blocks != 1 else ''}" if blocks else None,
    ]
