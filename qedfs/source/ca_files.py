"""Whose certificates are trusted, by https and nbds alike: what the user names, else what the system trusts.

Owns the environment variables and the places of CA files. Must not know TLS libraries. A file that is named is not
looked at here: if it is missing, that has to be an error and not other trust.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping

from qedfs.errors import SourceError
from qedfs.source.url import Location

MAX_FILE_BYTES = 16 << 20

# The pycurl wheel brings an OpenSSL of its own, which does not know where this system keeps its CA certificates.
_CA_FILES = (
    "/etc/ssl/certs/ca-certificates.crt",  # Debian, Arch
    "/etc/pki/tls/certs/ca-bundle.crt",  # Fedora, RHEL
    "/etc/ssl/ca-bundle.pem",  # SUSE
    "/etc/ssl/cert.pem",  # Alpine
)


# OpenSSL's words for an authority that is not known here; what to do about it is the same everywhere.
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
    """The files of CA certificates to trust: what the user names, else where this kind of system keeps them."""
    named = [environ[name] for name in _VARIABLES if environ.get(name)]
    if named:
        return named
    candidates = (ssl.get_default_verify_paths().cafile, *_CA_FILES)
    return [path for path in candidates if path and os.path.exists(path)][:1]


def find_ca_file(environ: Mapping[str, str]) -> str | None:
    """The one that counts for a library that takes only one."""
    return next(iter(find_ca_files(environ)), None)


def find_ca_folder(environ: Mapping[str, str]) -> str | None:
    """The folder of CA certificates, by their hashes, that the user names; trusted besides the file."""
    return environ.get("SSL_CERT_DIR") or None


def read_files(location: Location, *paths: str) -> list[bytes]:
    """The content of files, for errors that name the one that cannot be read: those of TLS libraries do not.

    Raises:
        SourceError: for `location`.
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
    """OpenSSL's objection to a certificate, with the way out if its authority is not known."""
    return objection + (
        " (an authority of your own: SSL_CERT_FILE, or `ca` in --credentials)" if objection in _UNKNOWN else ""
    )
