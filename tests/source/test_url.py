"""The text that names a backing: every form, and that no message about a wrong one holds a secret."""

from __future__ import annotations

import pytest

from qedfs.errors import UsageError
from qedfs.source.url import parse_location, redact, without_login


def test_http() -> None:
    location = parse_location("https://user:secret@Host.example/a/disk.raw?token=secret")
    assert (location.kind, location.host, location.port, location.tls) == ("http", "host.example", 443, True)
    assert str(location) == "https://Host.example/a/disk.raw?token=..."
    assert "secret" not in repr(location)
    assert location.secret_url == "https://user:secret@Host.example/a/disk.raw?token=secret"
    assert parse_location("http://[::1]:8080/x").port == 8080
    assert parse_location("http://h/").port == 80


def test_nbd() -> None:
    location = parse_location("nbd://host/a%20disk")
    assert (location.kind, location.host, location.port, location.export) == ("nbd", "host", 10809, "a disk")
    socket = parse_location("nbd+unix:///disk?socket=/run/s")
    assert (socket.host, socket.path, socket.export, socket.tls) == (None, "/run/s", "disk", False)
    keyed = parse_location("nbds://alice@host/?tls-psk-file=/etc/keys")
    assert (keyed.tls, keyed.user, keyed.tls_files) == (True, "alice", ("/etc/keys",))


def test_local_paths() -> None:
    assert parse_location("../base.raw", relative_to="/vms/a").path == "/vms/base.raw"
    assert parse_location("/x/./y", relative_to="/vms").path == "/x/y"
    assert parse_location("./a:b", relative_to="/vms").path == "/vms/a:b"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not a URL or a path"),
        ("a\nb", "not a URL or a path"),
        ("ftp://host/x", "ftp: is not supported"),
        ("json:{}", "json: is not supported"),
        ("file:/x", "file: is not supported"),
        ("http:///x", "no host"),
        ("http://host:99999/x", "not valid"),
        ("nbd:///x", "no host"),
        ("nbd+unix:///x", "absolute path"),
        ("nbd+unix:///x?socket=s", "absolute path"),
        ("nbd:host", "nbd://host:port/export"),
        ("nbd://h/?tls-psk-file=/k", "is for nbds://"),
        ("nbds://h/?tls-psk-file=k", "absolute path"),
        ("nbds://h/?tls-psk-file=/k&tls-certificates=/c", "not both"),
        ("nbds://h/?tls-verify-peer=0", "is not supported"),
    ],
)
def test_what_is_none_of_them(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_location(text)


@pytest.mark.parametrize(
    "text",
    [
        "http://user:secret@host/x",
        "http://host/x?secret",
        "http://host/x?sig=secret&secret==",
        "http://user:secret/more@host/x",
        "http:user:secret@host/x",
        "//user:secret@host/x",
        "http://user:secret#more@host/x",
        "nbd:user:secret@host:10809",
    ],
)
def test_no_secret_is_shown(text: str) -> None:
    assert "secret" not in redact(text)


def test_the_path_of_a_socket_is_no_secret() -> None:
    assert redact("nbd+unix:///d?socket=/run/s&x=y") == "nbd+unix:///d?socket=/run/s&x=..."


@pytest.mark.parametrize(
    ("text", "login", "query"),
    [
        ("http://host/disk.raw", False, False),
        ("http://user:pass@host/disk.raw", True, False),
        ("https://token@host/disk.raw", True, False),
        ("http://host/disk.raw?sig=abc", False, True),
        ("http://@host/disk.raw?", True, False),
        ("nbd://host/export", False, False),
        ("nbds://alice@host/export", False, False),
        ("nbds://alice:pass@host/export", True, False),
        ("nbd+unix:///export?socket=/s", False, False),
        ("nbd:host:10809:exportname=a:b@c", False, False),
        ("/srv/user:pass@host?x=y", False, False),
    ],
)
def test_what_an_overlay_would_store_of_secrets(text: str, login: bool, query: bool) -> None:
    location = parse_location(text)
    assert (location.stores_login, location.stores_query) == (login, query)


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("http://me:secret@host:80/a@b?c=d", "http://host:80/a@b?c=d"),
        ("http://host/me@x", "http://host/me@x"),
        ("nbd://me@host/x", "nbd://host/x"),
        ("/srv/me@host", "/srv/me@host"),
        ("http://[bad", "http://[bad"),
    ],
)
def test_a_place_has_no_login(url: str, place: str) -> None:
    assert without_login(url) == place
