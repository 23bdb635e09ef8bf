"""The TLS context of an nbds connection: certificates or a pre-shared key.

Owns the TLS settings for NBD and reads the files they need. Must not know sockets. Because it reads files, it must not
run on the event loop.
"""

from __future__ import annotations

import os
import pwd
import ssl
from collections.abc import Callable

from qedfs.errors import SourceError
from qedfs.source.ca_files import find_ca_files, find_ca_folder, read_files
from qedfs.source.credentials import TlsFiles
from qedfs.source.url import Location

# The file names that libnbd and QEMU use.
_IN_FOLDER = {"ca": "ca-cert.pem", "certificate": "client-cert.pem", "key": "client-key.pem"}
# Suites with forward secrecy and without certificates, which nobody would verify. TLS 1.3 has no separate suites for
# pre-shared keys, so a server without the key could continue with a certificate there.
_PSK_CIPHERS = "kECDHEPSK:kDHEPSK"

PskCallback = Callable[[str | None], tuple[str, bytes]]


def client_context(location: Location, given: TlsFiles) -> ssl.SSLContext:
    """The TLS context for a connection. Files that the location names take precedence over `given`.

    Raises:
        SourceError: a file cannot be read or used, or this Python does not support pre-shared keys.
    """
    files = _named_by(location) or given
    if files.psk_file is not None:
        return _with_psk(location, files.psk_file, location.user or files.user)
    return _with_certificates(location, files)


def _named_by(location: Location) -> TlsFiles | None:
    if location.psk_file is not None:
        return TlsFiles(psk_file=location.psk_file)
    if location.tls_folder is None:
        return None
    paths = {name: os.path.join(location.tls_folder, file) for name, file in _IN_FOLDER.items()}
    return TlsFiles(**{name: path for name, path in paths.items() if os.path.exists(path)})


def _with_certificates(location: Location, files: TlsFiles) -> ssl.SSLContext:
    ca_files = [files.ca] if files.ca else find_ca_files(os.environ)
    read_files(location, *filter(None, (*ca_files, files.certificate, files.key)))
    try:
        context = ssl.create_default_context(cafile=next(iter(ca_files), None))
        for path in ca_files[1:]:
            context.load_verify_locations(path)
        ca_folder = find_ca_folder(os.environ)
        if ca_folder is not None and files.ca is None:
            context.load_verify_locations(capath=ca_folder)
    except OSError as exc:  # includes SSLError
        raise SourceError(f"{location}: the CA certificates in {' and '.join(ca_files)} cannot be used") from exc
    if files.certificate is not None:
        try:
            context.load_cert_chain(files.certificate, files.key, password=_no_passphrase)
        except (OSError, ValueError) as exc:
            words = f"the client certificate in {files.certificate} or its key cannot be used"
            raise SourceError(f"{location}: {words}; it must be PEM, and the key without a passphrase") from exc
    return context


def _no_passphrase() -> str:
    # Without this callback OpenSSL would prompt on the terminal. An exception from the callback would get lost, so
    # return an empty passphrase, which is never right.
    return ""


def _with_psk(location: Location, path: str, user: str | None) -> ssl.SSLContext:
    name = user or pwd.getpwuid(os.geteuid()).pw_name  # the default of libnbd
    key = _read_key(location, path, name)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    use: Callable[[PskCallback], None] | None = getattr(context, "set_psk_client_callback", None)  # since Python 3.13
    if use is None:
        raise SourceError(f"{location}: pre-shared keys need Python 3.13 or newer; use certificates")
    context.check_hostname = False  # the key authenticates the server
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_PSK_CIPHERS)
    use(lambda _hint: (name, key))
    return context


def _read_key(location: Location, path: str, name: str) -> bytes:
    (text,) = read_files(location, path)
    for line in text.decode("utf-8", "replace").splitlines():
        user, colon, key = line.strip().rpartition(":")
        if colon and user == name:
            try:
                return bytes.fromhex(key)
            except ValueError:
                raise SourceError(f"{location}: the key of {name} in {path} is not in hex") from None
    raise SourceError(f"{location}: {path} has no key of the user {name}")
