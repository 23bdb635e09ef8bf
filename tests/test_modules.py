"""Every module of qedfs has its tests under its own name, so that who changes one knows where to look.

That is `test_<module>.py`, or `test_<folder>_<module>.py` where several modules have that name, among the tests of the
room. A module whose name no other one has may have them where it is seen through a command or a mount.
"""

from __future__ import annotations

import ast
import collections
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "qedfs"
TESTS = ROOT / "tests"

SEEN_THROUGH = ("cli/", "mount/", "service/")

# Modules whose tests are those of what they are a part of, or of the commands that show it. The list may only become
# shorter: a new module gets a file of its own.
TESTED_WITH = {
    "cli/commands/check.py": "cli/test_overlay_files.py",
    "cli/commands/info.py": "cli/test_overlay_files.py",
    "cli/commands/map.py": "cli/test_overlay_files.py",
    "cli/commands/status.py": "cli/test_watch.py",
    "cli/commands/umount.py": "cli/test_copies.py",
    "cli/commands/wait.py": "cli/test_wait_ended.py",
    "cli/daemon.py": "cli/test_mount.py",
    "cli/mount_table.py": "cli/test_copies.py",
    "cli/new_file.py": "host/test_durable.py",
    "cli/pin_options.py": "mount/test_options.py",
    "cli/served_images.py": "cli/test_watch.py",
    "cli/ui/bars.py": "cli/test_screens.py",
    "cli/ui/font.py": "cli/test_map_picture.py",
    "cli/ui/layout.py": "cli/test_screens.py",
    "cli/ui/output.py": "cli/test_stdio.py",
    "cli/ui/png.py": "cli/test_map_picture.py",
    "cli/ui/progress.py": "cli/test_screens.py",
    "cli/ui/screen.py": "cli/test_screens.py",
    "cli/ui/status_lines.py": "cli/test_screens.py",
    "control/monitoring/metrics_server.py": "service/test_metrics.py",
    "control/monitoring/status.py": "control/test_qedfs_commands.py",
    "control/qmp/block_job.py": "control/test_jobs.py",
    "control/qmp/block_nodes.py": "control/test_against_qemu.py",
    "control/qmp/command.py": "control/test_protocol.py",
    "control/qmp/dispatch.py": "control/test_protocol.py",
    "control/qmp/job_commands.py": "control/test_jobs.py",
    "control/qmp/schema.py": "control/test_protocol.py",
    "control/qmp/session.py": "control/test_protocol.py",
    "control/qmp/state.py": "control/test_server.py",
    "control/socket_file.py": "service/test_metrics.py",
    "jobs/stream.py": "jobs/test_lost_flights.py",
    "mount/fuse_attributes.py": "mount/test_fuse.py",
    "mount/images.py": "mount/test_supervisor.py",
    "mount/kernel_tuning.py": "mount/test_options.py",
    "mount/memory.py": "faults/test_freed_memory.py",
    "mount/open_images.py": "mount/test_served.py",
    "mount/opener.py": "mount/test_registry.py",
    "mount/overlay_folder.py": "mount/test_rescan.py",
    "mount/server.py": "mount/test_failed_start.py",
    "overlay/adoption.py": "overlay/test_model.py",
    "overlay/barrier.py": "faults/test_barrier.py",
    "overlay/cluster_writer.py": "overlay/test_commit.py",
    "overlay/create.py": "cli/test_overlay_files.py",
    "overlay/dirty_pages.py": "overlay/test_commit.py",
    "overlay/fill.py": "overlay/test_interop.py",
    "overlay/open.py": "overlay/test_recovery.py",
    "overlay/open_session.py": "overlay/test_session_start.py",
    "overlay/overlay.py": "overlay/test_model.py",
    "overlay/revalidation.py": "overlay/test_truncation.py",
    "source/ca_files.py": "source/http/test_nginx.py",
    "source/http/errors.py": "source/http/test_http_reasons.py",
    "source/http/exchange.py": "source/http/test_connections.py",
    "source/http/handle.py": "source/http/test_http_client.py",
    "source/http/route.py": "source/http/test_http_mirrors.py",
    "source/nbd/connection.py": "source/nbd/test_nbd_client.py",
    "source/nbd/errors.py": "source/nbd/test_nbd_reasons.py",
    "source/nbd/protocol.py": "source/nbd/test_nbd_handshake.py",
    "source/threads.py": "source/test_resolver.py",
}


def has_logic(module: Path) -> bool:
    """Whether anything happens in it: a protocol, names and types need no test."""
    if module.name in ("__init__.py", "__main__.py"):
        return False
    return any(
        isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_empty(node)
        for node in ast.walk(ast.parse(module.read_text()))
    )


def is_empty(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether its body is a docstring, `...` or both; or takes over arguments, as that of an exception."""
    trivial = (ast.Pass, ast.Assign, ast.AnnAssign) if function.name == "__init__" else (ast.Pass,)
    return all(
        isinstance(node, trivial)
        or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        or (function.name == "__init__" and isinstance(node, ast.Expr) and "super()" in ast.unparse(node))
        for node in function.body
    )


def modules() -> list[str]:
    return [str(path.relative_to(PACKAGE)) for path in sorted(PACKAGE.rglob("*.py")) if has_logic(path)]


@functools.cache
def files_by_name() -> dict[str, list[str]]:
    found = collections.defaultdict(list)
    for path in TESTS.rglob("test_*.py"):
        found[path.name].append(str(path.relative_to(TESTS)))
    return found


def own_tests(module: str, everything: list[str]) -> list[str]:
    """The files of tests that have the module's name."""
    path = Path(module)
    alone = sum(Path(other).stem == path.stem for other in everything) == 1
    names = (f"test_{path.stem}.py", f"test_{path.parent.name}_{path.stem}.py")
    room = path.parts[0] + "/" if len(path.parts) > 1 else ""
    found = [test for name in names for test in files_by_name().get(name, [])]
    return [test for test in found if test.startswith((room, *SEEN_THROUGH) if alone else room)]


def test_every_module_has_tests_under_its_name() -> None:
    everything = modules()
    without = [module for module in everything if not own_tests(module, everything)]
    assert sorted(set(without) - set(TESTED_WITH)) == [], "write test_<module>.py"
    assert sorted(set(TESTED_WITH) - set(without)) == [], "these have their own tests now, or are gone: take them out"


def test_the_tests_of_the_others_are_there() -> None:
    assert [test for test in TESTED_WITH.values() if not (TESTS / test).exists()] == []


def test_no_two_files_of_tests_share_a_name() -> None:
    assert {name: paths for name, paths in files_by_name().items() if len(paths) > 1} == {}


@pytest.mark.parametrize(
    ("text", "logic"),
    [
        ("NAME = 1", False),
        ("class Port:\n    def size(self) -> int:\n        'In bytes.'\n        ...", False),
        (
            "class Failure(Exception):\n    def __init__(self, a):\n        super().__init__(a)\n        self.a = a",
            False,
        ),
        ("def double(n):\n    return 2 * n", True),
        ("class Box:\n    def size(self):\n        self.asked = True", True),
    ],
)
def test_what_logic_is(tmp_path: Path, text: str, logic: bool) -> None:
    path = tmp_path / "module.py"
    path.write_text(text)
    assert has_logic(path) is logic
