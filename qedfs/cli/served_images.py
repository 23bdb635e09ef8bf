"""The images of a mount as its server describes them, and how a user names one."""

from __future__ import annotations

import math
from typing import Any

from qedfs.cli.mount_table import missing
from qedfs.cli.ui.layout import listed
from qedfs.control.qmp.client import Client, NotServed, error_of
from qedfs.errors import QedfsError, UsageError

Image = dict[str, Any]
BROKEN = "broken"  # the state of an overlay that is not served
MOST_NAMED = 10  # in a message


def connect(mountpoint: str, *, deadline: float = math.inf) -> Client:
    """Connect to the server of the mount. `deadline`: see Client.

    Raises:
        NotMounted: there is none that answers.
        TimedOut: it is silent.
        UsageError: the path is not one that a mount of qedfs could be at.
    """
    try:
        return Client.connect(mountpoint, deadline=deadline)
    except NotServed as exc:
        raise missing(mountpoint) from exc


def named(images: list[Image], name: str | None, mountpoint: str) -> list[Image]:
    """The image that the user means, all of them without a name.

    disk, disk.raw and disk.qed all mean the image disk.raw. Raises UsageError if there is none of that name.
    """
    if name is None:
        return images
    plain = stem(name)
    found = [image for image in images if stem(image["name"]) == plain]
    if not found:
        there = listed([image["name"] for image in images], MOST_NAMED) or "none"
        raise UsageError(f"{mountpoint}: has no image {name}; there is {there}")
    return found


def stem(name: str) -> str:
    """The name without what tells the image from its overlay."""
    return name.removesuffix(".raw").removesuffix(".qed")


def fetch(client: Client, name: str | None, mountpoint: str) -> list[Image]:
    """Ask for the images that the user means."""
    return named(client.execute("x-qedfs-status")["images"], name, mountpoint)


def trouble(image: Image) -> str | None:
    """What is wrong with an image or why it waits, for a line that names the image already; None if all is well."""
    if image["error"]:
        text: str = image["error"]
        return text.removeprefix(f"{image['overlay']}: ")
    return f"{image['state']} ({image['reason']})" if image["reason"] else None


def check_served(image: Image) -> None:
    """Raise the error that keeps an overlay from being served, for good or until it has come to rest."""
    if not image["served"]:
        raise failure_of(image)


def failure_of(image: Image) -> QedfsError:
    """The error of an image that does not go on by itself."""
    return error_of(image.get("exit_code"), f"{image['name']}: {trouble(image) or image['state']}")
