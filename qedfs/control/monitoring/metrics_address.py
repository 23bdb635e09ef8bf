"""Where a mount serves its metrics: an address of the machine or a Unix socket, as text and as a value.

Owns the spelling of `--metrics`; `metrics_server.py` listens there. Must not know what is served there. Pure, but for
the question whether the package for metrics is installed. Loads no trio: a command line is checked before anything is
served.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path

from qedfs.errors import UsageError

LOOPBACK = "127.0.0.1"

_ADDRESS = re.compile(r"^(?:(?P<host>\[[0-9a-fA-F:.%]+\]|[^:\[\]/]*):)?(?P<port>\d{1,5})$")


@dataclasses.dataclass(frozen=True, slots=True)
class Address:
    """Where to listen: a host and a port, or the path of a Unix socket."""

    host: str = LOOPBACK
    port: int = 0
    path: Path | None = None

    def __str__(self) -> str:
        """The text from which `parse_address` makes this address."""
        if self.path is not None:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """Parse "127.0.0.1:9188", ":9188", "9188", "[::1]:9188" or "unix:/run/metrics". The default host is loopback.

    Raises:
        UsageError: the text is not an address, or the package prometheus_client is not installed.
    """
    if importlib.util.find_spec("prometheus_client") is None:
        raise UsageError(
            "--metrics needs the package prometheus_client; install it: apt install python3-prometheus-client, "
            "or pipx inject qedfs prometheus_client"
        )
    if text.startswith("unix:") and len(text) > len("unix:"):
        return Address(path=Path(text.removeprefix("unix:")).absolute())
    found = _ADDRESS.match(text)
    if found is None or int(found["port"]) > 65535:
        raise UsageError(f"{text!r} is no address for metrics; write 127.0.0.1:9188 or unix:/run/qedfs/metrics")
    return Address((found["host"] or LOOPBACK).strip("[]"), int(found["port"]))
