"""The images of a mount as block nodes of a QEMU: listed, resized, made active or inactive.

Owns the commands `query-block`, `query-named-block-nodes`, `blockdev-set-active` and `block_resize`. Must not know how
the mount carries them out (`control/port.py`). An image disk.raw is the device `disk` with the node `disk`, driver qed.
"""

from __future__ import annotations

from typing import Any

from qedfs.control.port import ServedImage
from qedfs.control.qmp.command import Arg, Arguments, Commands
from qedfs.control.qmp.errors import QmpError
from qedfs.control.qmp.jobs import device_name
from qedfs.control.qmp.state import Call
from qedfs.image.image import Image

node_commands: Commands[Call] = Commands()

_THROTTLES = ("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr")


@node_commands("query-block")
async def _query_block(call: Call, _: Arguments) -> list[dict[str, Any]]:
    return [
        {"device": device_name(served), "type": "unknown", "removable": False, "locked": False, "inserted": node}
        for served, node in _nodes(call)
    ]


@node_commands("query-named-block-nodes", Arg("flat", "boolean", optional=True))
async def _query_named_block_nodes(call: Call, _: Arguments) -> list[dict[str, Any]]:
    return [node for _, node in _nodes(call)]


@node_commands("blockdev-set-active", Arg("node-name", optional=True), Arg("active", "boolean"))
async def _blockdev_set_active(call: Call, arguments: Arguments) -> dict[str, Any]:
    """As in QEMU 10: the handover of a migrated disk. Without a node name, for all nodes."""
    name = arguments.get("node-name")
    found = [served for served, _ in _nodes(call) if name in (None, device_name(served), served.name)]
    if name is not None and not found:
        raise QmpError(f"Failed to find node with node-name='{name}'")
    for served in found:
        if arguments["active"]:
            await call.control.mount.activate(served)
        else:
            await call.control.mount.deactivate(served)
    return {}


@node_commands("block_resize", Arg("device", optional=True), Arg("node-name", optional=True), Arg("size", "integer"))
async def _block_resize(call: Call, arguments: Arguments) -> dict[str, Any]:
    """As in QEMU: `size` is that of the image, in bytes. It only grows."""
    device, node = arguments.get("device", ""), arguments.get("node-name", "")
    name = node or device
    served = next((found for found, _ in _nodes(call) if name in (found.name, device_name(found))), None)
    if served is None:
        raise QmpError(f"Cannot find device='{device}' nor node-name='{node}'")
    if arguments["size"] < 0:
        raise QmpError("Parameter 'size' expects a >0 size")
    await call.control.mount.resize(served, arguments["size"])
    return {}


def _nodes(call: Call) -> list[tuple[ServedImage, dict[str, Any]]]:
    everything = call.control.mount.everything()
    return [(served, _node(served, served.image)) for served in everything if served.image is not None]


def _node(served: ServedImage, image: Image) -> dict[str, Any]:
    """BlockDeviceInfo of qapi/block-core.json."""
    node: dict[str, Any] = {
        "node-name": device_name(served),
        "drv": "qed",
        "file": served.path,
        "ro": not image.writable,
        "active": not image.in_standby,
        "encrypted": False,
        "detect_zeroes": "off",
        "write_threshold": 0,
        "cache": {"writeback": True, "direct": False, "no-flush": False},
        "backing_file_depth": 0 if image.complete else 1,
        "image": _image_info(served, image),
        **dict.fromkeys(_THROTTLES, 0),
    }
    return node if image.complete or image.source is None else {**node, "backing_file": str(image.source.location)}


def _image_info(served: ServedImage, image: Image) -> dict[str, Any]:
    """ImageInfo of qapi/block-core.json. The name of the backing is redacted, since it may contain a password."""
    info: dict[str, Any] = {
        "filename": served.path,
        "format": "qed",
        "virtual-size": image.size,
        "actual-size": image.overlay.disk_usage,
        "cluster-size": image.overlay.cluster_size,
        "dirty-flag": False,
    }
    if not image.complete and image.source is not None:
        backing = str(image.source.location)
        info |= {"backing-filename": backing, "full-backing-filename": backing}
        if not image.overlay.probes_backing:
            info["backing-filename-format"] = "raw"
    return info
