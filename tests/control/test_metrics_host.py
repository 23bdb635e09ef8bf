"""Which Host fields name us: a web page that a name leads to 127.0.0.1 is not among them."""

from __future__ import annotations

import pytest

from qedfs.control.monitoring.metrics_host import hosts_of, is_ours


def test_all_host_fields_are_found() -> None:
    head = b"GET / HTTP/1.1\r\nHost: a:1\r\nX-Host: b\r\nhOST:  c \r\n\r\n"
    assert hosts_of(head) == ["a:1", "c"]
    assert hosts_of(b"GET / HTTP/1.1\r\n\r\n") == []


@pytest.mark.parametrize(
    ("field", "bound", "ours"),
    [
        ("127.0.0.1:9188", "127.0.0.1", True),
        ("localhost:9188", "127.0.0.1", True),
        ("a.localhost", "127.0.0.1", True),
        ("[::1]:9188", "::1", True),
        ("evil.example:9188", "127.0.0.1", False),
        ("127.0.0.1.evil.example", "127.0.0.1", False),
        ("machine", "127.0.0.1", False),  # nobody reaches us by that name
        ("machine:9188", "0.0.0.0", True),
        ("machine.example", "0.0.0.0", True),
        ("machine.example.", "0.0.0.0", True),
        ("machinery", "0.0.0.0", False),
        ("192.0.2.7", "0.0.0.0", True),
        ("192.0.2.7", "192.0.2.7", True),
        ("192.0.2.8", "192.0.2.7", False),
        ("a b", "0.0.0.0", False),
        ("", "0.0.0.0", False),
        ("host:port", "host", False),
    ],
)
def test_who_is_us(field: str, bound: str, ours: bool) -> None:
    assert is_ours(field, bound, "Machine") is ours
