"""Internationalized host names to ASCII: UTS 46, non-transitional, as in browsers and curl.

Owns that conversion, so that the policy, resolver, proxy, certificate check and ~/.netrc all see the same name. Must
not know URLs.

Python's codec "idna" is not suitable. It implements IDNA 2003, which would contact strasse.example instead of
straße.example, with Unicode 3.2. Nor is libcurl: its wheels are built without IDN, and NBD does not use it. The
package `idna` is maintained, and trio depends on it anyway.
"""

from __future__ import annotations

import re
from urllib.parse import unquote

import idna

MAX_HOST_CHARS = 1024  # a name has at most 255; mapping much longer ones would only waste time
_NAME = re.compile(r"[a-z0-9_.-]+")
_MAX_LABEL_BYTES = 63
_JOINERS = frozenset("\u200c\u200d")


def ascii_host(host: str) -> str:
    """The host name in ASCII. An address is returned unchanged.

    Raises:
        ValueError: it is neither.
    """
    if ":" in host:
        return host  # IPv6; its zone may contain a percent sign
    try:
        # Redirects percent-encode names that are not ASCII.
        name = _mapped(unquote(host, errors="strict").lower())
    except (UnicodeDecodeError, idna.IDNAError) as exc:
        raise ValueError("not a host name") from exc
    if _NAME.fullmatch(name) is None:
        raise ValueError("not a host name")
    return name


def _mapped(host: str) -> str:
    if host.isascii():
        return host
    if len(host) > MAX_HOST_CHARS:
        raise ValueError("not a host name: it is too long")
    labels = idna.uts46_remap(host, std3_rules=False).split(".")
    return ".".join(label if label.isascii() else _encoded(label) for label in labels)


def _encoded(label: str) -> str:
    try:
        return idna.alabel(label).decode("ascii")
    except idna.InvalidCodepoint:
        # IDNA 2008 forbids symbols, but UTS 46 allows them, and hosts with such names exist.
        if _JOINERS & set(label):
            raise
        encoded = "xn--" + label.encode("punycode").decode("ascii")
        if len(encoded) > _MAX_LABEL_BYTES:
            raise
        return encoded
