"""The arrows between the rooms of qedfs point one way, and what may touch the world does so in one place.

Every file is parsed, none is imported: an import inside a function counts as much as one at the top.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1] / "qedfs"

# The package's own files, outside the table: the version, and `python -m qedfs`.
ENTRY = {"__init__": frozenset[str](), "__main__": frozenset({"cli"})}

PYFUSE3 = "mount/"
WRITER_CALLS = frozenset({"pwrite", "pwritev", "fdatasync", "ftruncate"})
# Only storage.py holds the fd of an overlay. The others write what is none: the journal on tmpfs, and memory.
WRITERS = {
    "overlay/storage.py": WRITER_CALLS,
    "overlay/journal.py": {"pwrite", "ftruncate"},
    "mount/held.py": {"ftruncate"},
}
# What `Overlay` is made of: other rooms ask it instead, so that its parts can be cut anew.
PARTS = frozenset({"clusters", "committer", "storage", "tables"})
NETWORK_MODULES = frozenset({"socket", "ssl", "pycurl"})
# The daemon's control socket is a Unix socket, and so is the service manager's; everything else that connects is a
# source.
NETWORK_ROOMS = (
    *("source/", "control/"),
    *("mount/notify.py", "mount/held.py", "mount/holder_machine.py", "cli/holding.py"),
)
# What opens a connection or a listening socket without `import socket`.
TRIO_NETWORK = frozenset(
    {
        *("open_tcp_stream", "open_tcp_listeners", "open_unix_socket", "open_ssl_over_tcp_stream"),
        *("serve_tcp", "serve_ssl_over_tcp", "SocketStream", "SocketListener", "SSLStream", "SSLListener", "socket"),
    }
)


def rooms(text: str) -> dict[str, frozenset[str]]:
    """The table of qedfs/README.md: what each room may import, in the table's order."""
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\|([^|]*)\|$", text, re.MULTILINE)
    return {room: frozenset(re.findall(r"\w+", imports)) for room, imports in rows}


ROOMS = rooms((PACKAGE / "README.md").read_text())


class Found(NamedTuple):
    """A name that a file imports or uses: `os.pwrite`, `qedfs.source.url`."""

    name: str
    line: int


class Module:
    """One parsed file of the package."""

    def __init__(self, path: str, text: str) -> None:
        self.path = path  # below qedfs/: "source/nbd/client.py"
        self.room = path.removesuffix(".py").split("/")[0]
        nodes = ast.walk(ast.parse(text, filename=path))
        self._nodes = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom | ast.Attribute)]
        self.imports = list(self._imports())
        self._aliases = self._module_aliases()
        self.uses = [*self.imports, *self._attributes()]

    def at(self, found: Found) -> str:
        return f"qedfs/{self.path}:{found.line}: {found.name}"

    def _imports(self) -> Iterator[Found]:
        for node in self._nodes:
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
        for node in self._nodes:
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                name = node.value.id
                yield Found(f"{self._aliases.get(name, name)}.{node.attr}", node.lineno)

    def parts_of(self, owner: str) -> Iterator[Found]:
        """The attributes that are taken of anything called `owner`, whether a name or an attribute itself."""
        for node in self._nodes:
            if isinstance(node, ast.Attribute) and isinstance(node.value, (ast.Name, ast.Attribute)):
                name = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
                if name.lstrip("_") == owner:
                    yield Found(node.attr, node.lineno)

    def _module_aliases(self) -> dict[str, str]:
        # `import os as _os` must not hide a use.
        imports = [node for node in self._nodes if isinstance(node, ast.Import)]
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
    return target == room or target in {**ROOMS, **ENTRY}.get(room, frozenset())


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


@functools.cache
def reached_through(module: Module) -> list[str]:
    """Uses of the parts of an overlay from another room, which asks the overlay itself (`Overlay`)."""
    if module.room == "overlay":
        return []
    return [f"{module.at(found)}: ask the overlay" for found in module.parts_of("overlay") if found.name in PARTS]


SHARED = "parsed modules"  # the group of pytest-xdist whose tests share what `modules` keeps


@functools.cache
def modules() -> list[Module]:
    return [Module(str(path.relative_to(PACKAGE)), path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))]


@pytest.mark.xdist_group(SHARED)
def test_arrows_between_rooms_point_one_way() -> None:
    wrong = [line for module in modules() for line in wrong_arrows(module)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.xdist_group(SHARED)
def test_the_world_is_touched_in_one_place_each() -> None:
    wrong = [line for module in modules() for line in wrong_uses(module)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.xdist_group(SHARED)
def test_no_room_reaches_through_the_overlay() -> None:
    wrong = [line for module in modules() for line in reached_through(module)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("path", "text", "wrong"),
    [
        ("jobs/stream.py", "image.overlay.clusters.missing", 1),
        ("mount/opener.py", "overlay.storage.close()", 1),
        ("image/pin.py", "self._overlay.committer", 1),
        ("image/pin.py", "self._overlay.missing; storage.close()", 0),
        ("overlay/open.py", "overlay.storage.close()", 0),
    ],
)
def test_overlay_rule(path: str, text: str, wrong: int) -> None:
    assert len(reached_through(Module(path, text))) == wrong


@pytest.mark.xdist_group(SHARED)
def test_every_file_is_in_a_known_room() -> None:
    assert [module.path for module in modules() if module.room not in {*ROOMS, *ENTRY}] == []


def test_the_table_points_one_way() -> None:
    order = list(ROOMS)
    assert len(order) == 12
    upwards = [(room, other) for room in order for other in ROOMS[room] if order.index(other) <= order.index(room)]
    assert upwards == []


@pytest.mark.xdist_group(SHARED)
def test_the_table_names_no_arrow_that_is_not_there() -> None:
    """Whoever draws a new arrow sees it in the table, and one that is no longer needed goes."""
    used: dict[str, set[str]] = {room: set() for room in ROOMS}
    for module in modules():
        ours = [found.name.split(".") for found in module.imports if found.name.startswith("qedfs.")]
        if module.room in used:
            used[module.room] |= {parts[1] for parts in ours if not parts[1].startswith("__")} - {module.room}
    assert used == {room: set(imports) for room, imports in ROOMS.items()}


@pytest.mark.parametrize(
    ("path", "text", "complaint"),
    [
        (
            "jobs/stream.py",
            "from qedfs.mount import registry",
            "qedfs/jobs/stream.py:1: qedfs.mount.registry: jobs may not",
        ),
        ("jobs/stream.py", "from qedfs import cli", "jobs may not import cli"),
        ("jobs/stream.py", "from ..cli import main", "jobs may not import cli"),
        (
            "overlay/check.py",
            "\nimport qedfs.source.url",
            "qedfs/overlay/check.py:2: qedfs.source.url: overlay may not",
        ),
        ("overlay/check.py", "from qedfs.fetch.queue import Fetch", "overlay may not import fetch"),
        (
            "source/http.py",
            "def f():\n  from qedfs.image.image import Image",
            "http.py:2: qedfs.image.image.Image: source may not",
        ),
        ("overlay/l1.py", "from qedfs.units import size", None),
        ("errors.py", "from qedfs.units import size", "errors may not import units"),
        ("units.py", "from qedfs.image.image import Image", "units may not import image"),
        ("image/image.py", "from qedfs.helpers import x", "image may not import helpers"),
        ("cli/main.py", "from qedfs.mount import server", None),
        ("mount/server.py", "from qedfs.control.qmp.server import Server", None),
        ("fetch/queue.py", "from qedfs.overlay.overlay import Overlay", "fetch may not import overlay"),
        ("image/image.py", "from qedfs.overlay.overlay import Overlay", None),
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
        ("image/image.py", "import pyfuse3", "qedfs/image/image.py:1: pyfuse3: only mount/"),
        ("mount/fuse.py", "import pyfuse3", None),
        ("overlay/commit.py", "import os\nos.fdatasync(3)", "qedfs/overlay/commit.py:2: os.fdatasync"),
        ("overlay/commit.py", "import os as _os\n_os.pwritev(3, [], 0)", "commit.py:2: os.pwritev"),
        ("overlay/commit.py", "from os import ftruncate", "commit.py:1: os.ftruncate"),
        ("overlay/storage.py", "import os\nos.pwrite(3, b'', 0)", None),
        ("overlay/journal.py", "import os\nos.fdatasync(3)", "qedfs/overlay/journal.py:2: os.fdatasync"),
        ("cli/commands/export.py", "import os\nos.ftruncate(3, 0)", "qedfs/cli/commands/export.py:2: os.ftruncate"),
        ("fetch/queue.py", "import ssl", "queue.py:1: ssl: only source/"),
        ("mount/server.py", "import trio\nasync def f(): await trio.open_unix_socket('x')", "trio.open_unix_socket"),
        ("control/qmp/server.py", "import socket", None),
        ("mount/notify.py", "import socket", None),
        ("mount/server.py", "import socket", "mount/server.py:1: socket: only source/"),
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
