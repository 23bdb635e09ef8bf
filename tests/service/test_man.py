"""Manual pages made from the commands' help, and completion in the shell."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest

from qedfs import errors
from qedfs.cli.entry import INTERRUPTED
from qedfs.cli.main import COMMANDS, main
from tests.harness.hang import HANG_SECONDS
from tests.harness.require import require

from .machine import CONTRIB, ROOT

HELPER = CONTRIB / "mount.qedfs.8"
MANUAL = tomllib.loads((CONTRIB / "manual.toml").read_text())


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("man")
    subprocess.run([sys.executable, CONTRIB / "man", folder], check=True, timeout=HANG_SECONDS)
    return folder


def command(name: str) -> click.Command:
    found = main.get_command(click.Context(main), name)
    assert found is not None
    return found


def test_a_page_for_every_command(pages: Path) -> None:
    groups = {name: group for name in COMMANDS if isinstance(group := command(name), click.Group)}
    below = {f"qedfs-{name}-{word}" for name, group in groups.items() for word in group.commands}
    names = {"qedfs", *(f"qedfs-{name}" for name in COMMANDS), *below}
    assert {page.name for page in pages.iterdir()} == {f"{name}.1" for name in names}


def test_groff_has_nothing_to_complain_about(pages: Path) -> None:
    for page in (*sorted(pages.iterdir()), HELPER):
        words: list[str | Path] = [require("groff"), "-man", "-ww", "-Tutf8", "-z", "-rLL=100n", page]
        done = subprocess.run(words, capture_output=True, text=True, timeout=HANG_SECONDS, check=False)
        assert (done.returncode, done.stderr) == (0, "")


def test_mandoc_has_nothing_to_complain_about(pages: Path) -> None:
    words: list[str | Path] = [require("mandoc"), "-T", "lint", "-W", "all", *sorted(pages.iterdir()), HELPER]
    done = subprocess.run(words, capture_output=True, text=True, timeout=HANG_SECONDS, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_their_names_are_found_by_apropos(pages: Path) -> None:
    page = pages / "qedfs.1"
    done = subprocess.run([require("lexgrog"), page], capture_output=True, text=True, timeout=HANG_SECONDS, check=True)
    assert done.stdout.startswith(f'{page}: "qedfs - mount QED overlays')


def test_the_same_source_makes_the_same_pages(tmp_path: Path) -> None:
    environment = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000"}
    subprocess.run([sys.executable, CONTRIB / "man", tmp_path], env=environment, check=True, timeout=HANG_SECONDS)
    assert (tmp_path / "qedfs.1").read_text().startswith(".TH QEDFS 1 2023-11-14 ")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_in_the_page_as_it_is_typed(pages: Path, name: str) -> None:
    shown = _shown(pages / f"qedfs-{name}.1")
    assert f"qedfs-{name} - " in shown
    for option in command(name).params:
        if isinstance(option, click.Option) and not option.hidden:
            assert all(word in shown for word in (*option.opts, *option.secondary_opts))
        elif isinstance(option, click.Option):
            assert not any(word in shown for word in option.opts)
        else:
            assert (option.name or "").upper() in shown


def test_examples_are_understood() -> None:
    """By the parser of each command, as if they had been typed; nothing is run."""
    found = [line for entry in MANUAL["commands"].values() for _, lines in entry["examples"] for line in lines]
    typed = [shlex.split(line)[1:] for line in found if line.startswith("qedfs ")]
    assert len(typed) > len(COMMANDS)
    for words in typed:
        group, rest = click.Context(main), words[1:]
        parsed: click.Command | None = command(words[0])
        if isinstance(parsed, click.Group):
            _, parsed, rest = parsed.resolve_command(group, rest)
        assert parsed is not None
        parsed.make_context(words[0], rest, parent=group)


@pytest.mark.parametrize("name", ["qedfs", *(f"qedfs-{name}" for name in COMMANDS)])
def test_every_page_has_its_sections(pages: Path, name: str) -> None:
    sections = re.findall(r"^\.SH (.*)$", (pages / f"{name}.1").read_text(), re.MULTILINE)
    wanted = ["EXIT STATUS", "ENVIRONMENT", "FILES", "EXAMPLES"]
    entry = MANUAL["commands"][name]
    assert [section for section in sections if section in wanted] == [
        section for section in wanted if section == "EXIT STATUS" or section.lower() in entry
    ]


def test_every_variable_that_is_read_is_in_a_page() -> None:
    documented = {name for key, entry in MANUAL["environment"].items() for name in (key, *entry.get("also", []))}
    reads = re.compile(r"environ(?:ment)?(?:\.get\(|\[)\"(\w+)\"")
    read = {name for path in (ROOT / "qedfs").rglob("*.py") for name in reads.findall(path.read_text())}
    # Python's own, which is handed on; and curl's spelling in capitals.
    assert {name.lower() if name.lower() in documented else name for name in read} - documented == {"PYTHONPATH"}
    assert {"CURL_CA_BUNDLE", "SSL_CERT_FILE"} <= documented
    used = {name for entry in MANUAL["commands"].values() for name in entry.get("environment", [])}
    assert used == MANUAL["environment"].keys()
    assert {name for entry in MANUAL["commands"].values() for name in entry.get("files", [])} == MANUAL["files"].keys()


def test_every_exit_code_is_in_the_page(pages: Path) -> None:
    text = (pages / "qedfs.1").read_text().partition(".SH EXIT STATUS")[2].partition(".SH")[0]
    codes = {kind.exit_code for kind in vars(errors).values() if isinstance(kind, type) and hasattr(kind, "exit_code")}
    assert {int(code) for code in re.findall(r"\\fB(\d+)\\fR", text)} == codes | {0, INTERRUPTED}


def test_quotes_and_hyphens_can_be_pasted(pages: Path) -> None:
    shown = _shown(pages / "qedfs.1")
    assert 'eval "$(_QEDFS_COMPLETE=bash_source qedfs)"' in " ".join(shown.split())
    assert "--help" in shown
    assert "-h" in shown


def _shown(page: Path) -> str:
    # -P-c: without the terminal's codes for bold and italics.
    words: list[str | Path] = [require("groff"), "-man", "-Tutf8", "-P-c", "-P-b", "-P-u", "-rLL=200n", page]
    return subprocess.run(words, capture_output=True, text=True, timeout=HANG_SECONDS, check=True).stdout


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PATH with an installed `qedfs`: the name of the variable that asks for completion depends on it."""
    folder = tmp_path_factory.mktemp("bin")
    script = folder / "qedfs"
    script.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from qedfs.cli.main import main\nsys.exit(main())\n"
    )
    script.chmod(0o755)
    return f"{folder}:{os.environ.get('PATH', os.defpath)}"


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("qedfs mo", ["mount"]),
        ("qedfs stream re", ["resume"]),
        ("qedfs mount --stream-", ["--stream-between", "--stream-delay"]),
        ("qedfs mount --stream ", ["eager", "idle", "off"]),
    ],
)
def test_bash_completes(program: str, typed: str, offered: list[str]) -> None:
    """The function that bash is given, called as bash calls it when TAB is pressed."""
    words = typed.split(" ")
    script = (
        'eval "$(_QEDFS_COMPLETE=bash_source qedfs)"\n'
        f"COMP_WORDS=({' '.join(word or chr(39) * 2 for word in words)}) COMP_CWORD={len(words) - 1}\n"
        '_qedfs_completion qedfs\nprintf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(
        [require("bash"), "-c", script],
        env={**os.environ, "PATH": program},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=True,
    )
    assert done.stdout.split() == offered


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_gets_its_script(program: str, shell: str) -> None:
    environment = {**os.environ, "PATH": program, "_QEDFS_COMPLETE": f"{shell}_source"}
    done = subprocess.run(["qedfs"], env=environment, capture_output=True, text=True, timeout=HANG_SECONDS, check=True)
    assert "_QEDFS_COMPLETE" in done.stdout
