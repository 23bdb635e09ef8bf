"""Reading a profile: what is no profile is refused with the file's name."""

from __future__ import annotations

from pathlib import Path

import pytest

from qedfs.cli.profile_file import read_profile
from qedfs.errors import UsageError
from qedfs.image.boot_profile import MOST_FILE_BYTES, written


def test_what_was_written_is_read(tmp_path: Path) -> None:
    ranges = ((65536, 4096), (0, 512))
    (tmp_path / "p").write_text(written(ranges, "a boot"))
    assert read_profile(str(tmp_path / "p")) == ranges


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"0 1\n", "is not a profile; qedfs profile makes one"),
        (b"\xff\n", "is not a profile; qedfs profile makes one"),
        (b"x" * (MOST_FILE_BYTES + 1), "is too large for a profile"),
        (None, "No such file or directory; qedfs profile creates profiles"),
    ],
)
def test_what_is_no_profile_is_refused(content: bytes | None, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "p"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError) as refusal:
        read_profile(str(path))
    assert str(refusal.value) == f"{path}: {complaint}"
