"""How the address for metrics is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from qedfs.control.monitoring.metrics_address import Address, parse_address
from qedfs.errors import UsageError


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("9188", Address("127.0.0.1", 9188)),
        (":9188", Address("127.0.0.1", 9188)),
        ("0.0.0.0:9188", Address("0.0.0.0", 9188)),
        ("localhost:0", Address("localhost", 0)),
        ("[::1]:9188", Address("::1", 9188)),
        ("unix:/run/metrics", Address(path=Path("/run/metrics"))),
    ],
)
def test_addresses(text: str, address: Address) -> None:
    assert parse_address(text) == address == parse_address(str(address))


@pytest.mark.parametrize("text", ["", "host", "host:", "host:65536", "::1:80", "unix:", "http://host:80", "/run/x"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UsageError, match="no address for metrics"):
        parse_address(text)
