"""A name that has left the mount is opened by another program, whose end is waited for."""

from __future__ import annotations

from pathlib import Path

import pytest

from qedfs.mount import kernel_names
from qedfs.mount.kernel_names import KernelNames


async def test_another_program_opens_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[list[str]] = []

    async def run(argv: list[str]) -> int:
        opened.append(argv)
        return 1  # there is no such file

    monkeypatch.setattr(kernel_names, "run", run)
    await KernelNames(str(tmp_path)).drop("disk.raw")
    assert opened == [["head", "-c0", "--", str(tmp_path / "disk.raw")]]
