"""The credentials file: header fields, client certificates and pre-shared keys, each for the URLs below a prefix.

Owns the format of the file, and the rule that a server gets only the credentials whose URL prefix covers the backing.
An overlay may name any server, but must not make us send it the credentials of another. Must not know how credentials
are sent. No `repr` and no message contains a secret, but they may contain the paths of files with secrets.

    ["https://gitlab.example/group/"]
    headers = { PRIVATE-TOKEN = "..." }

    ["nbds://backup.example/"]
    ca = "ca.pem"                  # trusted for this prefix, instead of the system's
    certificate = "client.pem"
    key = "client-key.pem"

    ["nbds://other.example/"]
    psk-file = "keys.psk"          # lines "user:key in hex", as psktool writes them
    user = "alice"                 # default: the user who mounts
"""

from __future__ import annotations

import dataclasses
import os
import re
import stat
import tomllib

from qedfs.errors import UsageError, file_error
from qedfs.source.policy import below
from qedfs.source.url import Location, parse_location

_FILES = ("ca", "certificate", "key", "psk-file")
_KEYS = frozenset({"headers", "user", *_FILES})
_HEADER_LINE = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*")  # RFC 9110, section 5.5
# Fields that qedfs or libcurl controls. Another value would change the meaning of a request or of its answer.
_RESERVED = re.compile(
    r"(?:host|range|if-.*|accept-encoding|connection|te|transfer-encoding|content-length|expect|upgrade)", re.IGNORECASE
)
_WHERE = re.compile(r"at (line \d+, column \d+|end of document)\)")


@dataclasses.dataclass(frozen=True, slots=True)
class TlsFiles:
    """Absolute paths of PEM files, and of a file of pre-shared keys. `user`: the name of the key to use in it."""

    ca: str | None = None
    certificate: str | None = None
    key: str | None = None  # None: the key is in the file of the certificate
    psk_file: str | None = None
    user: str | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of all files that are set."""
        return tuple(filter(None, (self.ca, self.certificate, self.key, self.psk_file)))


NO_TLS_FILES = TlsFiles()


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """The credentials for locations below `prefix`. `headers` are "Name: value" lines."""

    prefix: Location | None = None
    headers: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    tls: TlsFiles = NO_TLS_FILES


@dataclasses.dataclass(frozen=True, slots=True)
class Credentials:
    """The entries of a credentials file."""

    entries: tuple[Entry, ...] = ()

    def entry_for(self, location: Location) -> Entry:
        """The entry with the longest prefix that covers the location; an empty entry if none does."""
        found = [entry for entry in self.entries if entry.prefix is not None and below(entry.prefix, location)]
        return max(found, key=lambda entry: len(entry.prefix.secret_url) if entry.prefix else 0, default=Entry())


NO_CREDENTIALS = Credentials()


def read_credentials(path: str) -> Credentials:
    """Read a credentials file.

    Raises:
        UsageError: everybody may read the file, it is not there, or it is invalid. The message contains no secret.
        Inaccessible: we may not read it.
    """
    folder = os.path.dirname(os.path.abspath(path))
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_mode & stat.S_IROTH:
                raise UsageError(f"{path}: is readable by everybody; chmod 600 {path}")
            sections = tomllib.load(file)
    except OSError as exc:
        raise file_error(f"{path}: {exc.strerror}", exc) from exc
    except UnicodeDecodeError:
        raise UsageError(f"{path}: is not text in UTF-8") from None
    except tomllib.TOMLDecodeError as exc:
        where = _WHERE.search(str(exc))  # the rest of the message may quote a secret
        raise UsageError(f"{path}: is not TOML" + (f", {where[1]}" if where else "")) from None
    return Credentials(tuple(_entry(path, folder, name, section) for name, section in sections.items()))


def _entry(path: str, folder: str, name: str, section: object) -> Entry:
    try:
        prefix = parse_location(name)
    except UsageError as exc:
        raise UsageError(f"{path}: {exc}") from None
    where = f"{path}: [{prefix}]"
    if prefix.kind not in ("http", "nbd") or not isinstance(section, dict):
        raise UsageError(f'{where} is not a section for a URL like ["https://host/"]')
    unknown = sorted(section.keys() - _KEYS)
    if unknown:
        raise UsageError(f"{where} has the unknown key {unknown[0]!r}; known are {', '.join(sorted(_KEYS))}")
    values = {key: section[key] for key in section if key != "headers"}
    if not all(isinstance(value, str) and value for value in values.values()):
        raise UsageError(f"{where}: {', '.join(sorted(_KEYS - {'headers'}))} must be non-empty strings")
    files = {key.replace("-", "_"): os.path.join(folder, values[key]) for key in _FILES if key in values}
    _check(where, prefix, set(values), has_headers="headers" in section)
    return Entry(prefix, _lines(where, section.get("headers", {})), TlsFiles(**files, user=values.get("user")))


def _check(where: str, prefix: Location, given: set[str], *, has_headers: bool) -> None:
    if has_headers and prefix.kind != "http":
        raise UsageError(f"{where}: headers are for http and https")
    if given and not prefix.tls:
        raise UsageError(f"{where}: {min(given)} is for https and nbds, which use TLS")
    if prefix.kind == "http" and given & {"psk-file", "user"}:
        raise UsageError(f"{where}: https has no pre-shared keys; psk-file and user are for nbds")
    if "psk-file" in given and given & {"ca", "certificate", "key"}:
        raise UsageError(f"{where}: give psk-file or certificates, not both")
    if "key" in given and "certificate" not in given:
        raise UsageError(f"{where}: there is a key without a certificate")


def _lines(where: str, headers: object) -> tuple[str, ...]:
    if not isinstance(headers, dict) or not all(isinstance(value, str) for value in headers.values()):
        raise UsageError(f'{where}: headers are given as {{ NAME = "value" }}')
    for name, value in headers.items():
        if _RESERVED.fullmatch(name):
            raise UsageError(f"{where}: qedfs sets the header {name} itself")
        if _HEADER_LINE.fullmatch(f"{name}: {value}") is None:
            raise UsageError(f"{where}: the header {name!r} has a name or a value that HTTP does not allow")
    return tuple(f"{name}: {value}" for name, value in headers.items())
