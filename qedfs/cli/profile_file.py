"""Reads the file that `qedfs profile` has written, for a mount that fetches its ranges first."""

from __future__ import annotations

from qedfs.errors import UsageError, file_error
from qedfs.image.boot_profile import MOST_FILE_BYTES, Range, parsed


def read_profile(path: str) -> tuple[Range, ...]:
    """The ranges of a profile. Raises UsageError, or Inaccessible."""
    try:
        with open(path, "rb") as file:
            data = file.read(MOST_FILE_BYTES + 1)
    except OSError as exc:
        raise file_error(f"{path}: {exc.strerror}; qedfs profile creates profiles", exc) from exc
    if len(data) > MOST_FILE_BYTES:
        raise UsageError(f"{path}: is too large for a profile")
    return parsed(data.decode(errors="replace"), path)
