"""Which libfuse pyfuse3 has loaded. Owns the question; must not know who asks, nor what is served with it."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

from qedfs.errors import QedfsError

_LOADED = re.compile(r"(/.*/libfuse3[^/\n]*\.so[^/\n]*)$", re.MULTILINE)


def libfuse(maps: Path = Path("/proc/self/maps")) -> tuple[str, str]:
    """(version, path) of the libfuse that pyfuse3 uses. The version is "" if the library does not tell it.

    Raises:
        QedfsError: pyfuse3 or libfuse cannot be loaded.
    """
    try:
        import pyfuse3  # noqa: F401 - loads libfuse
    except ImportError as exc:
        raise QedfsError(f"pyfuse3 cannot be loaded: {exc}") from exc
    found = _LOADED.search(maps.read_text())
    if found is None:
        raise QedfsError("pyfuse3 has loaded no libfuse3")
    tell = getattr(ctypes.CDLL(found[1]), "fuse_pkgversion", None)  # since 3.0
    if tell is None:
        return "", found[1]
    tell.restype = ctypes.c_char_p
    return tell().decode(), found[1]
