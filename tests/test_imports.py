"""The arrows between the rooms of qedfs point one way, and what may touch the world does so in one place.

Every file is parsed, none is imported: an import inside a function counts as much as one at the top.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1] / "qedfs"

# A room may import from itself and from what stands to its right.
ORDER = (
    *("cli", "mount", "control", "stream", "image", "version", "fetch", "overlay", "source"),
    *("turns", "backlog", "rests", "format", "errors"),
)
# `overlay` is one file on disk and knows no network; `fetch` brings bytes and does not know where they are kept.
FORBIDDEN = {("overlay", "source"), ("fetch", "overlay")}
# Leaves: anyone may import them, they import at most `errors`. From `flight` on they are parts of fetch and image.
LEAVES = frozenset(
    {
        *("buffers", "descriptors", "durable", "log", "units", "procfs", "runtime", "flight", "window", "readahead"),
        *("room", "ranges", "histogram", "profile"),
    }
)
LEAF_ARROWS = {("runtime", "procfs")}
# The package's own files, outside the order: the version, and `python -m qedfs`.
ENTRY = {"__init__": frozenset[str](), "__main__": frozenset({"cli"})}

PYFUSE3 = "mount/"
WRITER_CALLS = frozenset({"pwrite", "pwritev", "fdatasync", "ftruncate"})
# Only storage.py holds the fd of an overlay. The other one writes a file that is none: the journal on tmpfs.
WRITERS = {
    "overlay/storage.py": WRITER_CALLS,
    "overlay/journal.py": {"pwrite"},
}
NETWORK_MODULES = frozenset({"socket", "ssl", "pycurl"})
# The daemon's control socket is a Unix socket, and so is the service manager's; everything else that connects is a
# source.
NETWORK_ROOMS = ("source/", "control/", "control.py", "mount/notify.py")
# What opens a connection or a listening socket without `import socket`.
TRIO_NETWORK = frozenset(
    {
        *("open_tcp_stream", "open_tcp_listeners", "open_unix_socket", "open_ssl_over_tcp_stream"),
        *("serve_tcp", "serve_ssl_over_tcp", "SocketStream", "SocketListener", "SSLStream", "SSLListener", "socket"),
    }
)


class Found(NamedTuple):
    """A name that a file imports or uses: `os.pwrite`, `qedfs.source.url`."""

    name: str
    line: int


class Module:
    """One parsed file of the package."""

    def __init__(self, path: str, text: str) -> None:
        self.path = path  # below qedfs/: "source/nbd/client.py"
        self.room = path.removesuffix(".py").split("/")[0]
        self._tree = ast.parse(text, filename=path)
        self.imports = list(self._imports())
        self._aliases = self._module_aliases()
        self.uses = [*self.imports, *self._attributes()]

    def at(self, found: Found) -> str:
        return f"qedfs/{self.path}:{found.line}: {found.name}"

    def _imports(self) -> Iterator[Found]:
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Import):
                yield from (Found(alias.name, node.lineno) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                origin = self._origin(node)
                yield from (Found(f"{origin}.{alias.name}", node.lineno) for alias in node.names)

    def _origin(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        here = ["qedfs", *self.path.split("/")]
        return ".".join([*here[: len(here) - node.level], *([node.module] if node.module else [])])

    def _attributes(self) -> Iterator[Found]:
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                name = node.value.id
                yield Found(f"{self._aliases.get(name, name)}.{node.attr}", node.lineno)

    def _module_aliases(self) -> dict[str, str]:
        # `import os as _os` must not hide a use.
        imports = [node for node in ast.walk(self._tree) if isinstance(node, ast.Import)]
        return {alias.asname: alias.name for node in imports for alias in node.names if alias.asname}


def wrong_arrows(module: Module) -> list[str]:
    """Imports of qedfs rooms that point to the left, or at a room that is none."""
    wrong = []
    for found in module.imports:
        parts = found.name.split(".")
        if parts[0] != "qedfs":
            continue
        # `from qedfs import __version__` names no room.
        target = parts[1] if len(parts) > 1 else "__init__"
        if target.startswith("__") or _may_import(module.room, target):
            continue
        wrong.append(f"{module.at(found)}: {module.room} may not import {target}")
    return wrong


def _may_import(room: str, target: str) -> bool:
    if room in ENTRY:
        return target in ENTRY[room] or target in LEAVES
    if room in LEAVES:
        return target == "errors" or target == room or (room, target) in LEAF_ARROWS
    if target in LEAVES:
        return room != "errors"
    if room == "format":
        return target in ("format", "errors")
    if room not in ORDER or target not in ORDER or (room, target) in FORBIDDEN:
        return False
    return room != "errors" and ORDER.index(room) <= ORDER.index(target)


def wrong_uses(module: Module) -> list[str]:
    """Uses of the outside world in a room that has no business with it."""
    return [f"{module.at(found)}: {rule}" for found in module.uses for rule in _broken_rules(module.path, found.name)]


def _broken_rules(path: str, name: str) -> Iterator[str]:
    top, _, rest = name.partition(".")
    member = rest.split(".")[0]
    if top == "pyfuse3" and not path.startswith(PYFUSE3):
        yield "only mount/ imports pyfuse3"
    if top == "os" and member in WRITER_CALLS and member not in WRITERS.get(path, ()):
        yield "only overlay/storage.py writes to the overlay's file"
    if top in NETWORK_MODULES and not path.startswith(NETWORK_ROOMS):
        yield "only source/ and control/ open sockets"
    if top == "trio" and member in TRIO_NETWORK and not path.startswith(NETWORK_ROOMS):
        yield "only source/ and control/ open sockets"
    if top == "trio" and path.startswith("format/"):
        yield "format/ has no I/O and no trio"


def modules() -> list[Module]:
    return [Module(str(path.relative_to(PACKAGE)), path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))]


def test_arrows_between_rooms_point_one_way() -> None:
    wrong = [line for module in modules() for line in wrong_arrows(module)]
    assert not wrong, "\n".join(wrong)


def test_the_world_is_touched_in_one_place_each() -> None:
    wrong = [line for module in modules() for line in wrong_uses(module)]
    assert not wrong, "\n".join(wrong)


def test_every_file_is_in_a_known_room() -> None:
    known = {*ORDER, *LEAVES, *ENTRY}
    assert [module.path for module in modules() if module.room not in known] == []


@pytest.mark.parametrize(
    ("path", "text", "complaint"),
    [
        (
            "stream/job.py",
            "from qedfs.mount import folder",
            "qedfs/stream/job.py:1: qedfs.mount.folder: stream may not",
        ),
        ("stream/job.py", "from qedfs import cli", "stream may not import cli"),
        ("stream/job.py", "from ..cli import main", "stream may not import cli"),
        (
            "overlay/check.py",
            "\nimport qedfs.source.url",
            "qedfs/overlay/check.py:2: qedfs.source.url: overlay may not",
        ),
        ("overlay/check.py", "from qedfs.fetch import Fetch", "overlay may not import fetch"),
        ("source/http.py", "def f():\n  from qedfs.image import Image", "http.py:2: qedfs.image.Image: source may not"),
        ("format/header.py", "from qedfs.units import size", None),
        ("errors.py", "from qedfs.units import size", "errors may not import units"),
        ("units.py", "from qedfs.image import Image", "units may not import image"),
        ("image.py", "from qedfs.helpers import x", "image may not import helpers"),
        ("cli/main.py", "from qedfs.mount import daemon", None),
        ("mount/daemon.py", "from qedfs.control.server import Server", None),
        ("fetch.py", "from qedfs.overlay.overlay import Overlay", "fetch may not import overlay"),
        ("image.py", "from qedfs.overlay.overlay import Overlay", None),
    ],
)
def test_arrow_rule(path: str, text: str, complaint: str | None) -> None:
    found = wrong_arrows(Module(path, text))
    if complaint is None:
        assert found == []
    else:
        assert [complaint in line for line in found] == [True]


@pytest.mark.parametrize(
    ("path", "text", "complaint"),
    [
        ("image.py", "import pyfuse3", "qedfs/image.py:1: pyfuse3: only mount/"),
        ("mount/operations.py", "import pyfuse3", None),
        ("overlay/commit.py", "import os\nos.fdatasync(3)", "qedfs/overlay/commit.py:2: os.fdatasync"),
        ("overlay/commit.py", "import os as _os\n_os.pwritev(3, [], 0)", "commit.py:2: os.pwritev"),
        ("overlay/commit.py", "from os import ftruncate", "commit.py:1: os.ftruncate"),
        ("overlay/storage.py", "import os\nos.pwrite(3, b'', 0)", None),
        ("overlay/journal.py", "import os\nos.fdatasync(3)", "qedfs/overlay/journal.py:2: os.fdatasync"),
        ("cli/export.py", "import os\nos.ftruncate(3, 0)", "qedfs/cli/export.py:2: os.ftruncate"),
        ("fetch.py", "import ssl", "fetch.py:1: ssl: only source/"),
        ("mount/daemon.py", "import trio\nasync def f(): await trio.open_unix_socket('x')", "trio.open_unix_socket"),
        ("control/server.py", "import socket", None),
        ("mount/notify.py", "import socket", None),
        ("mount/daemon.py", "import socket", "mount/daemon.py:1: socket: only source/"),
        ("source/nbd/client.py", "import socket", None),
        ("format/table.py", "from trio import sleep", "format/table.py:1: trio.sleep: format/ has no I/O"),
    ],
)
def test_use_rule(path: str, text: str, complaint: str | None) -> None:
    found = wrong_uses(Module(path, text))
    if complaint is None:
        assert found == []
    else:
        assert [complaint in line for line in found] == [True]
