"""The CA certificates that https and nbds trust: those that the user names, otherwise the system's.

Owns the environment variables and the paths of CA files. Must not know TLS libraries. Whether a file that the user
names exists is not checked here. If it is missing, that must be an error, not a fall-back to the system's.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping

from qedfs.errors import SourceError
from qedfs.source.url import Location

MAX_FILE_BYTES = 16 << 20

# The pycurl wheel contains its own OpenSSL, which does not know where this system keeps its CA certificates.
_CA_FILES = (
    "/etc/ssl/certs/ca-certificates.crt",  # Debian, Arch
    "/etc/pki/tls/certs/ca-bundle.crt",  # Fedora, RHEL
    "/etc/ssl/ca-bundle.pem",  # SUSE
    "/etc/ssl/cert.pem",  # Alpine
)


# OpenSSL's messages for an unknown certificate authority. The advice is the same for all of them.
_UNKNOWN = frozenset(
    {
        "unable to get local issuer certificate",
        "unable to get issuer certificate",
        "self-signed certificate",
        "self-signed certificate in certificate chain",
        "self signed certificate",
        "self signed certificate in certificate chain",
    }
)
_VARIABLES = ("CURL_CA_BUNDLE", "SSL_CERT_FILE")  # in curl's order


def find_ca_files(environ: Mapping[str, str]) -> list[str]:
    """The files of CA certificates to trust: those that the user names, otherwise the system's."""
    named = [environ[name] for name in _VARIABLES if environ.get(name)]
    if named:
        return named
    candidates = (ssl.get_default_verify_paths().cafile, *_CA_FILES)
    return [path for path in candidates if path and os.path.exists(path)][:1]


def find_ca_file(environ: Mapping[str, str]) -> str | None:
    """The first of these files, for a library that takes only one."""
    return next(iter(find_ca_files(environ)), None)


def find_ca_folder(environ: Mapping[str, str]) -> str | None:
    """The folder of hashed CA certificates that the user names. It is trusted in addition to the files."""
    return environ.get("SSL_CERT_DIR") or None


def read_files(location: Location, *paths: str) -> list[bytes]:
    """Read files, so that an error names the unreadable one. The errors of TLS libraries do not.

    Raises:
        SourceError: a file cannot be read. The message names `location` and the file.
    """
    contents = []
    for path in paths:
        try:
            with open(path, "rb") as file:
                contents.append(file.read(MAX_FILE_BYTES))
        except OSError as exc:
            raise SourceError(f"{location}: {path}: {exc.strerror}") from exc
    return contents


def with_advice(objection: str) -> str:
    """OpenSSL's objection to a certificate, with advice if the authority is unknown."""
    return objection + (
        " (an authority of your own: SSL_CERT_FILE, or `ca` in --credentials)" if objection in _UNKNOWN else ""
    )
