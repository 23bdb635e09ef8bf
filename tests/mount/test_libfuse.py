"""Which libfuse is in use."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest

from qedfs.errors import QedfsError
from qedfs.mount.libfuse import libfuse


def test_the_libfuse_of_this_machine_tells_its_version() -> None:
    version, path = libfuse()
    assert version.startswith("3.")
    assert Path(path).exists()


def test_a_library_that_does_not_tell(tmp_path: Path) -> None:
    other = next(Path("/usr/lib").glob("*/libc.so.6"))
    link = tmp_path / "libfuse3.so.3"
    link.symlink_to(other)
    maps = tmp_path / "maps"
    maps.write_text(f"7f00-7f01 r-xp 00000000 fe:00 1  /usr/bin/python3\n7f02-7f03 r-xp 0000 fe:00 2  {link}\n")
    assert ctypes.CDLL(str(link)) is not None
    assert libfuse(maps) == ("", str(link))


def test_no_libfuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "maps").write_text("7f00-7f01 r-xp 00000000 fe:00 1  /usr/bin/python3\n")
    with pytest.raises(QedfsError, match="has loaded no libfuse3"):
        libfuse(tmp_path / "maps")
    monkeypatch.setitem(sys.modules, "pyfuse3", None)
    with pytest.raises(QedfsError, match="pyfuse3 cannot be loaded"):
        libfuse()
