"""The images of a mount as its server reports them, and how a user names one.

Owns which image a name means (disk, disk.raw and disk.qed are one), and the error for an image that is not served. Must
not know what a command is about to do with it.
"""

from __future__ import annotations

import math
import os
from typing import Any

from qedfs.cli.takeovers import lasting_client, reach_server
from qedfs.cli.ui.layout import listed
from qedfs.cli.ui.output import print_json
from qedfs.control.qmp.client import Client, error_of
from qedfs.errors import QedfsError, UsageError

Image = dict[str, Any]
BROKEN = "broken"  # the state of an overlay that is not served
STOPPED = ("failed", "source-changed")  # the states of a stream that an error has stopped
MOST_NAMED = 10  # names in a message


class Released(UsageError):
    """The image that the user means has left the mount."""


def connect(mountpoint: str, *, deadline: float = math.inf) -> Client:
    """Connect to the server of the mount. `deadline`: see Client. Raises what `reach_server` raises."""
    return reach_server(mountpoint, deadline=deadline)


def named(images: list[Image], name: str | None, mountpoint: str) -> list[Image]:
    """The image that the user means, or all images if `name` is None.

    disk, disk.raw and disk.qed all mean the image disk.raw. Raises UsageError if there is no such image.
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
    """The name without the suffix of image or overlay."""
    return name.removesuffix(".raw").removesuffix(".qed")


def fetch(client: Client, name: str | None, mountpoint: str) -> list[Image]:
    """Ask the server for the images that the user means. Raises Released, and UsageError if there is no such image."""
    status = client.execute("x-qedfs-status")
    if name is not None and stem(name) + ".raw" in status.get("released", ()):
        raise Released(f"{mountpoint}: has released {name}; qedfs release --undo serves it again")
    return named(status["images"], name, mountpoint)


def on_each(mountpoint: str, image: str | None, command: str, *, as_json: bool, **arguments: Any) -> None:  # noqa: ANN401
    """Run a QMP command for the images that the user means; with JSON, print their status."""
    with lasting_client(mountpoint) as client:
        chosen = fetch(client, image, mountpoint)
        # An image that is not served is an error if the user has named it. Otherwise it is skipped.
        for found in chosen if image is not None else [found for found in chosen if found["served"]]:
            check_served(found)
            client.execute(command, device=found["name"], **arguments)
        if as_json:
            print_images(client, image, mountpoint)


def print_images(client: Client, image: str | None, mountpoint: str) -> None:
    """Print the status of the images that the user means as JSON."""
    print_json({"mountpoint": os.path.abspath(mountpoint), "images": fetch(client, image, mountpoint)})


def trouble(image: Image) -> str | None:
    """What is wrong with an image, or why it waits; None if all is well. Does not repeat the name of the image."""
    if image["error"] and image["error"] == image["reason"] and image["condition"][0]["cause"] == "source-away":
        return f"{image['state']} ({image['error']})"
    if image["error"]:
        return _without_path(image, image["error"])
    return f"{image['state']} ({image['reason']})" if image["reason"] else None


def check_served(image: Image) -> None:
    """Raise an error if the overlay is not served: it is broken, or still being copied."""
    if not image["served"]:
        raise failure_of(image)


def failure_of(image: Image) -> QedfsError:
    """The error of an image that needs somebody to act: why it is not served, or why its stream has stopped."""
    text = trouble(image)
    if image["state"] in STOPPED and image.get("reason"):
        # The exit code is that of this error. What is worst now may be something else, such as a full disk.
        text = _without_path(image, image["reason"])
    return error_of(image.get("exit_code"), f"{image['name']}: {text or image['state']}")


def _without_path(image: Image, text: str) -> str:
    return text.removeprefix(f"{image['overlay']}: ")
