"""A throw-away certificate authority, one server certificate for 127.0.0.1 and localhost, and one of a client.

The files carry the names that QEMU and nbdkit look for in a credentials folder, so one folder serves nginx, both NBD
servers and their clients.
"""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path
from typing import NamedTuple

from .require import require

# openssl's own default configuration would add CA:TRUE to the leaf, which QEMU refuses in a server.
_CONFIG = """
[req]
distinguished_name = name
prompt = no
[name]
CN = {name}
[ca]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign
subjectKeyIdentifier = hash
[server]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectAltName = DNS:localhost, IP:127.0.0.1
[client]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = clientAuth
"""


class Certificate(NamedTuple):
    """Paths of one server's credentials; `folder` is what QEMU and nbdkit take as a whole."""

    folder: Path
    ca: Path
    cert: Path
    key: Path
    client_cert: Path
    client_key: Path


def certificate(folder: Path) -> Certificate:
    """Makes the authority, and one certificate each for a server and a client, in `folder`, valid for two days."""
    names = ("ca-cert", "server-cert", "server-key", "client-cert", "client-key")
    made = Certificate(folder, *(folder / f"{name}.pem" for name in names))
    authority_key = folder / "ca-key.pem"
    _openssl_req(folder, "qedfs test authority", "ca", authority_key, made.ca)
    signer = ("-CA", str(made.ca), "-CAkey", str(authority_key))
    _openssl_req(folder, "localhost", "server", made.key, made.cert, *signer)
    _openssl_req(folder, "qedfs test client", "client", made.client_key, made.client_cert, *signer)
    return made


def put_group(folder: Path) -> None:
    """Give QEMU a Diffie-Hellman group (RFC 7919), or each server makes one, for up to a second."""
    (folder / "dh-params.pem").write_bytes(_group())


@functools.cache
def _group() -> bytes:
    words = ("genpkey", "-genparam", "-algorithm", "DH", "-pkeyopt", "group:ffdhe2048")
    return subprocess.run([require("openssl"), *words], check=True, capture_output=True).stdout


def _openssl_req(folder: Path, name: str, extensions: str, key: Path, cert: Path, *signer: str) -> None:
    config = folder / "openssl.cnf"
    config.write_text(_CONFIG.format(name=name))
    subprocess.run(
        [
            *(require("openssl"), "req", "-x509", "-config", config, "-extensions", extensions, "-days", "2"),
            *("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", key, "-out", cert),
            *signer,
        ],
        check=True,
        capture_output=True,
    )
