"""Which libraries qedfs uses here, and whether they are new enough.

Owns the list of packages with their least versions, as `pyproject.toml` has it. Must not know what they are used for.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import qedfs
from qedfs.cli.doctor.finding import Finding, fail, ok, warn
from qedfs.errors import QedfsError
from qedfs.mount.libfuse import libfuse
from qedfs.source.libcurl import Libcurl, libcurl

# pyproject.toml, which an installed program does not have. A test compares them.
NEEDED = {"pyfuse3": "3.4", "trio": "0.26", "pycurl": "7.45.4", "click": "8.1", "rich": "13.9", "idna": "3.7"}
OPTIONAL = {"prometheus_client": ("0.20", "--metrics"), "zstandard": ("0.22", "qcow2 images packed with zstd")}
_HAS_ZSTD = (3, 14)  # the first Python that has zstd itself

_CERTIFICATE = b"-----BEGIN CERTIFICATE-----"
_MOST_BYTES = 16 << 20


def checks() -> Sequence[tuple[str, Callable[[], Finding]]]:
    """The checks with their names."""
    return (
        ("qedfs", lambda: ok("qedfs", f"{qedfs.__version__}, {os.path.dirname(qedfs.__file__)}")),
        ("Python", lambda: ok("Python", python())),
        ("packages", lambda: packages(installed([*NEEDED, *OPTIONAL]), sys.version_info[:2])),
        ("imports", lambda: imports([name for name in NEEDED if name not in ("pyfuse3", "pycurl")])),
        ("libfuse", fuse),
        ("libcurl", lambda: curl(libcurl())),
        ("CA certificates", trusted),
    )


def python() -> str:
    """Which Python this is."""
    return f"{platform.python_implementation()} {platform.python_version()}, {sys.executable}"


def installed(names: Sequence[str]) -> dict[str, str]:
    """The versions of those packages that are there."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def packages(found: Mapping[str, str], version: tuple[int, ...]) -> Finding:
    """`found`: package -> version. `version`: of Python."""
    check = "packages"
    shown = ", ".join(f"{name} {number}" for name, number in found.items())
    missing = [name for name in NEEDED if name not in found]
    if missing:
        return fail(check, f"{', '.join(missing)} not found; there are {shown}", "install qedfs anew")
    old = [f"{name} {least}" for name, least in NEEDED.items() if _numbers(found[name]) < _numbers(least)]
    if old:
        return warn(check, f"{shown}; older than what qedfs is tested with", f"have at least {', '.join(old)}")
    absent = [
        f"no {name} (for {purpose})"
        for name, (_, purpose) in OPTIONAL.items()
        if name not in found and not (name == "zstandard" and version >= _HAS_ZSTD)
    ]
    return ok(check, ", ".join([shown, *absent]))


def imports(names: Sequence[str]) -> Finding:
    """Whether these packages can be loaded. Those with a library in C have checks of their own."""
    broken = []
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as exc:
            broken.append(f"{name} cannot be loaded ({exc})")
    if broken:
        return fail("imports", "; ".join(broken), "install that anew")
    return ok("imports", f"{', '.join(names)} can be loaded")


def fuse() -> Finding:
    """The libfuse that pyfuse3 has loaded."""
    try:
        version, path = libfuse()
    except QedfsError as exc:
        return fail("libfuse", str(exc), "install libfuse3 (Debian: libfuse3-3 or -4), then pyfuse3 anew")
    return ok("libfuse", f"{version or 'of unknown version'}, {path}")


def curl(found: Libcurl) -> Finding:
    """`found`: the libcurl that pycurl has loaded."""
    check = "libcurl"
    shown = f"{found.version} with {found.tls or 'no TLS'}, pycurl {found.binding}"
    if found.lacks:
        return fail(check, f"{shown}, without {' and '.join(sorted(found.lacks))}", "install another libcurl or pycurl")
    if not found.cancels_quickly:
        return warn(
            check,
            f"{shown}: the end of a mount may wait for the look-up of a server's name",
            "libcurl 7.87 and later do not wait; the wheels of pycurl have one",
        )
    return ok(check, f"{shown}, http and https")


def trusted() -> Finding:
    """The CA certificates that are trusted now."""
    # Imported here because it imports idna, which may be what is missing.
    from qedfs.source.ca_files import find_ca_files, find_ca_folder

    return authorities(find_ca_files(os.environ), find_ca_folder(os.environ))


def authorities(files: Sequence[str], folder: str | None) -> Finding:
    """`files` and `folder`: what https and nbds trust."""
    check = "CA certificates"
    way_out = "correct SSL_CERT_FILE or CURL_CA_BUNDLE, or install ca-certificates"
    if not files and folder is None:
        return warn(check, "none, so that https and nbds trust no server", way_out)
    shown = []
    for path in dict.fromkeys(files):  # several variables may name one file
        try:
            with Path(path).open("rb") as file:
                count = file.read(_MOST_BYTES).count(_CERTIFICATE)
        except OSError as exc:
            return warn(check, f"{path}: {exc.strerror}; https and nbds do not work", way_out)
        if not count:
            return warn(check, f"{path}: has no certificate; https and nbds do not work", way_out)
        shown.append(f"{count} in {path}")
    return ok(check, ", ".join([*shown, *([f"and those in {folder}"] if folder else [])]))


def _numbers(version: str) -> tuple[int, ...]:
    """The numbers at the beginning of a version: "7.45.4.dev1" -> (7, 45, 4)."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()
