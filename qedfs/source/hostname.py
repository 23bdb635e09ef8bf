"""A host name as people write it -> the one that is asked for: UTS 46, non-transitional, as browsers and curl do.

Owns that step, so that the policy, resolver, proxy, certificate check and ~/.netrc see one name. Must not know URLs.

Not Python's codec "idna": that is IDNA 2003, which asks the owner of strasse.example when straße.example was meant, and
Unicode 3.2. Not libcurl either: its wheels are built without IDN, and NBD does not go through it. `idna` is maintained,
and trio brings it anyway.
"""

from __future__ import annotations

import re
from urllib.parse import unquote

import idna

MAX_HOST_CHARS = 1024  # a name has 255 at the most; the mapping of more is not worth its time
_NAME = re.compile(r"[a-z0-9_.-]+")
_MAX_LABEL_BYTES = 63
_JOINERS = frozenset("\u200c\u200d")


def ascii_host(host: str) -> str:
    """The name in ASCII; an address stays as it is.

    Raises:
        ValueError: it is neither.
    """
    if ":" in host:
        return host  # IPv6, whose zone may have a percent sign
    try:
        # Redirects write names that are not ASCII in this way.
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
        # IDNA 2008 knows no symbols; UTS 46 lets them pass, and there are hosts with such names.
        if _JOINERS & set(label):
            raise
        encoded = "xn--" + label.encode("punycode").decode("ascii")
        if len(encoded) > _MAX_LABEL_BYTES:
            raise
        return encoded
