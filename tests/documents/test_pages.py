"""What the pages of the documents claim of the program: messages, commands, options, metrics, QMP, files, links."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import click
import pytest

from qedfs.cli.main import main as program
from qedfs.control.monitoring.metrics import STATES, MountCollector
from qedfs.control.port import Mounted
from qedfs.control.qmp.dispatch import commands
from qedfs.control.qmp.schema import schema
from qedfs.control.qmp.session import negotiation
from qedfs.errors import QedfsError, Reason
from qedfs.image.condition import Cause
from qedfs.source.credentials import read_credentials

from .blocks import ROOT, documents, files

DOCS = ROOT / "contrib/docs"
REFERENCE = (DOCS / "reference.md").read_text()
README_LINES = 150


def leaves(command: click.Command, context: click.Context, path: str = "") -> Iterator[tuple[str, click.Context]]:
    """The commands that are no groups, as they are typed."""
    if not isinstance(command, click.Group):
        yield path, context
        return
    for name in command.list_commands(context):
        found = command.get_command(context, name)
        assert found is not None
        yield from leaves(found, click.Context(found, info_name=name, parent=context), f"{path} {name}".strip())


COMMANDS = dict(leaves(program, click.Context(program, info_name="qedfs")))


def section(text: str, heading: str) -> str:
    """What stands under a heading."""
    found = re.search(rf"^(#+) {re.escape(heading)}$\n(.*?)(?=^#{{1,3}} |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, heading
    return found[2]


def test_the_reference_has_the_commands_that_there_are() -> None:
    text = REFERENCE[REFERENCE.index("## Commands") : REFERENCE.index("## Exit codes")]
    assert re.findall(r"^### (.+)$", text, re.MULTILINE) == list(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_reference_has_the_options_that_there_are(name: str) -> None:
    there = {
        spelling
        for option in COMMANDS[name].command.get_params(COMMANDS[name])
        if isinstance(option, click.Option) and not option.hidden and "--help" not in option.opts
        for spelling in (*option.opts, *option.secondary_opts)
    }
    rows = re.findall(r"^\| (`-.*?`) \|", section(REFERENCE, name), re.MULTILINE)
    told = {spelling for row in rows for spelling in re.findall(r"(?<![\w-])-{1,2}[a-z][a-z-]*", row)}
    assert told == there


def test_the_reference_has_the_exit_codes() -> None:
    codes = {0, 130} | {kind.exit_code for kind in _all_errors(QedfsError)}
    told = re.findall(r"^\| (\d+) \|", section(REFERENCE, "Exit codes"), re.MULTILINE)
    assert [int(code) for code in told] == sorted(codes)


def _all_errors(kind: type[QedfsError]) -> Iterator[type[QedfsError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _all_errors(below)


def test_the_reference_has_the_states_and_causes() -> None:
    text = section(REFERENCE, "What a status says")
    assert [state for state in STATES if f"`{state}`" not in text] == []
    assert re.findall(r"^\| `([a-z-]+)` \|", text, re.MULTILINE) == [str(cause) for cause in Cause]
    [json_causes] = re.findall(r"^\| `cause` \|(.*)\|$", (DOCS / "reference-json.md").read_text(), re.MULTILINE)
    assert re.findall(r"`([a-z-]+)`", json_causes) == [str(cause) for cause in Cause]


def test_the_reference_has_the_metrics_with_their_labels() -> None:
    total = SimpleNamespace(limiter=SimpleNamespace(limit=0, granted=0), fetched=0)
    empty = SimpleNamespace(mountpoint="", restart=None, total=total, everything=list, fetches=list)
    there = {
        metric.name + ("_total" if metric.type == "counter" else "")
        for metric in MountCollector(cast("Mounted", empty)).collect()
    }
    text = section(REFERENCE, "Metrics")
    assert set(re.findall(r"^\| `(qedfs_\w+)` \|", text, re.MULTILINE)) == there
    assert [reason for reason in Reason if f"`{reason}`" not in text] == []


def test_the_reference_has_the_qmp_commands_and_events() -> None:
    text = section(REFERENCE, "QMP")
    events = [entry["name"] for entry in schema([]) if entry["meta-type"] == "event"]
    assert [name for name in (*negotiation, *commands, *events) if not re.search(rf"`{name}[` ]", text)] == []
    assert set(re.findall(r"`(x-qedfs-[a-z-]+)", text)) - set(commands) == {"x-qedfs-exit-code"}


def _texts() -> Iterator[str]:
    """The strings in the code, with the variable parts left out."""
    for path in sorted((ROOT / "qedfs").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_the_messages_in_troubleshooting_are_real() -> None:
    code = "\n".join(_texts())
    text = (DOCS / "troubleshooting.md").read_text()
    cells = re.findall(r"^\| (`.*?`) \|", text, re.MULTILINE)
    assert len(cells) > 50
    quoted = [part.strip() for cell in cells for span in re.findall(r"`(.+?)`", cell) for part in span.split("…")]
    assert [part for part in quoted if part not in code] == []


def test_the_credentials_file_is_one(tmp_path: Path) -> None:
    for text in files(DOCS / "guide.md", "toml"):
        for name in re.findall(r'"([a-z-]+\.(?:pem|psk))"', text):
            (tmp_path / name).write_text("")
        path = tmp_path / "credentials.toml"
        path.write_text(text)
        path.chmod(0o600)
        assert len(read_credentials(str(path)).entries) == 3


@pytest.mark.parametrize("document", [*documents(), ROOT / "contrib/CHANGELOG.md"], ids=lambda path: path.stem)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", document.read_text())):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        path = document.parent / name if name else document
        assert path.exists(), target
        assert not anchor or anchor in _anchors(path), target


def _anchors(path: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES
