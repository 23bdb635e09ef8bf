"""Checks the Host field of a request, so that a web page cannot read the metrics through a local browser.

Any site can make its own name resolve to 127.0.0.1 after its page has loaded ("DNS rebinding"). The browser then lets
the page read what is served there. But the Host field that the browser sends still names that site, not this server.

Pure. Owns which names are ours. Must not know what is served.
"""

from __future__ import annotations

import ipaddress
import re

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]]+)(:[0-9]{1,5})?", re.ASCII)  # RFC 9110, section 7.2


def hosts_of(head: bytes) -> list[str]:
    """The values of all Host fields of a request's head."""
    fields = (line.partition(b":") for line in head.split(b"\r\n")[1:])
    return [value.strip().decode("ascii", "replace") for name, _, value in fields if name.lower() == b"host"]


def is_ours(field: str, bound: str, machine: str) -> bool:
    """Whether a Host names us.

    Args:
        field: as it was sent, with or without a port.
        bound: the name or address that we listen at.
        machine: the name of this machine; it counts where others can reach us.
    """
    found = _HOST.fullmatch(field.lower())
    if found is None:
        return False
    name = found[1].strip("[]").removesuffix(".")
    bound = bound.lower().removesuffix(".")
    if name == bound or name == "localhost" or name.endswith(".localhost"):
        return True
    here = _address(bound)
    if (address := _address(name)) is not None:
        return address.is_loopback or (here is not None and (here.is_unspecified or address == here))
    machine = machine.lower()
    local = bound == "localhost" or (here is not None and here.is_loopback)
    return not local and bool(machine) and (name == machine or name.startswith(f"{machine}."))


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None
