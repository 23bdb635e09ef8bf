"""Explains TLS alerts: what the server objects to, in our words instead of the TLS library's.

Owns the words. Must not know whether HTTP or NBD has connected. Pure. No part of the library's text is passed on,
because it may contain a URL.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Said(NamedTuple):
    """What an alert means. `lasting`: a retry is of no use."""

    words: str
    lasting: bool = True


_ALERT = re.compile(r"alert ([a-z ]+)")
_MEANING = {
    "certificate required": Said("the server wants a client certificate (see --credentials)"),
    "handshake failure": Said(
        "the server refuses the TLS handshake; it may want a client certificate (see --credentials)", lasting=False
    ),
    "unknown psk identity": Said("the server does not know the user of our pre-shared key"),
    "decrypt error": Said("the server finds our certificate or key wrong", lasting=False),
    "bad record mac": Said("the server finds our pre-shared key wrong", lasting=False),
    **dict.fromkeys(
        ("bad certificate", "unknown ca", "certificate unknown", "certificate revoked", "access denied"),
        Said("the server does not accept our client certificate"),
    ),
    "certificate expired": Said("the server finds our client certificate expired"),
    "unsupported certificate": Said("the server does not accept this kind of client certificate"),
    "protocol version": Said("the server speaks no version of TLS that we accept"),
}


def explain_alert(text: str) -> Said | None:
    """What the alert in an error text of OpenSSL means; None if it contains no known alert.

    Alerts come from the server. A fault in the server's own certificate is not an alert: our side detects and reports
    it.
    """
    found = _ALERT.search(text.replace("_", " ").lower())
    return None if found is None else _MEANING.get(found[1].strip())
