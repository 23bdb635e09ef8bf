"""What the libcurl of this machine can do. Owns the question; must not know who asks."""

from __future__ import annotations

import dataclasses

from qedfs.errors import QedfsError

NEEDED_PROTOCOLS = frozenset({"http", "https"})


@dataclasses.dataclass(frozen=True, slots=True)
class Libcurl:
    """`tls`: name and version of its TLS library, "" if it has none. `binding`: the version of pycurl."""

    version: str
    tls: str
    protocols: frozenset[str]
    binding: str

    @property
    def lacks(self) -> frozenset[str]:
        """The protocols that qedfs needs and this libcurl does not have."""
        return NEEDED_PROTOCOLS - self.protocols

    @property
    def cancels_quickly(self) -> bool:
        """Whether a transfer can be cancelled while the server's name is looked up (`http/handle.py`): libcurl 7.87."""
        return [int(part) for part in self.version.split(".")[:2]] >= [7, 87]


def libcurl() -> Libcurl:
    """The libcurl that pycurl uses. Raises QedfsError if it cannot be loaded."""
    try:
        import pycurl
    except ImportError as exc:
        raise QedfsError(f"pycurl cannot be loaded: {exc}") from exc
    told = pycurl.version_info()
    binding = pycurl.version.partition(" ")[0].partition("/")[2]
    return Libcurl(told[1], told[5] or "", frozenset(told[8]), binding)
