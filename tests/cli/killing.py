"""Commands that are killed before each of their steps at the overlay file."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

# Each child runs the command once, and is killed before the step that is its number.
KILLS = """
import os, signal, shutil, sys
import qedfs.cli.commands.commit, qedfs.source.open, qedfs.image.commit_down, qedfs.fetch.queue
import qedfs.cli.commands.defrag
from qedfs.cli.main import main
from qedfs.overlay.storage import FileStorage

def child(folder, at, words):
    steps = 0
    def killing(name):
        step = getattr(FileStorage, name)
        def counted(self, *args):
            nonlocal steps
            steps += 1
            if steps == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self, *args)
        setattr(FileStorage, name, counted)
    for name in ("write", "resize", "punch", "barrier"):
        killing(name)
    sys.argv = ["qedfs", *(word.replace("FOLDER", folder) for word in words), "--quiet"]
    try:
        main()
    except SystemExit as exc:
        os._exit(exc.code or 0)

template, every, *words = sys.argv[1:]
for at in range(1, 1000, int(every)):
    folder = f"{template}-{at}"
    shutil.copytree(template, folder)
    pid = os.fork() or child(folder, at, words)
    if os.waitpid(pid, 0)[1] != signal.SIGKILL:
        break
    print(folder)
"""


def kills(template: Path, every: int, *command: str) -> Iterator[Path]:
    """The copies of a folder in which a command was killed, each before another step. FOLDER in it stands for each."""
    words: list[str | Path] = [sys.executable, "-c", KILLS, template, str(every), *command]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    yield from map(Path, done.stdout.split())
