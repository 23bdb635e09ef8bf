"""What a user has typed for a backing: the usual mistakes are told with what to type instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from qedfs.cli.backing_argument import location_of, misplaced_url
from qedfs.errors import UsageError


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("localhost/base.raw", "a URL begins with its scheme, like http://localhost/base.raw"),
        ("server.example/a/base.raw", "a URL begins with its scheme, like http://server.example/a/base.raw"),
        ("127.0.0.1:8080/base.raw", "a URL begins with its scheme, like http://127.0.0.1:8080/base.raw"),
        ("server:8080/base.raw", "a URL begins with its scheme, like http://server:8080/base.raw"),
        ("server:8080", "a URL begins with its scheme, like http://server:8080"),
        ("http//server/base.raw", "a URL is written like http://server/base.raw"),
        ("HTTPS/server/base.raw", "a URL is written like https://server/base.raw"),
        ("nbd//server/x", "a URL is written like nbd://server/x"),
        ("http:/server/base.raw", "no host in the URL; write it like http://host/disk.raw"),
        ("http:///base.raw", "no host in the URL; write it like http://host/disk.raw"),
        ("nbd:///x", "no host in the URL; write it like nbd://host/export"),
        ("file:///srv/base.raw", "give the path alone, like /srv/base.raw"),
        ("file:base.raw", "give the path alone, like base.raw"),
        ("file://", "give the path alone, like /disk.raw"),
        ("s3://bucket/base.raw", "s3: is not supported; use http, https, nbd, nbds or nbd+unix"),
    ],
)
def test_what_to_type_instead(tmp_path: Path, text: str, advice: str) -> None:
    with pytest.raises(UsageError) as caught:
        location_of(text, str(tmp_path))
    assert str(caught.value).endswith(advice)


@pytest.mark.parametrize(
    "text",
    ["http//user:geheim@host/x", "file://user:geheim@host/x", "user:1/geheim@host/x", "host.example/u:geheim@/x"],
)
def test_the_advice_shows_no_password(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError) as caught:
        location_of(text, str(tmp_path))
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize("text", ["localhost/base.raw", "http//server/base.raw", "server.example/base.raw"])
def test_a_file_that_is_there_is_meant(tmp_path: Path, text: str) -> None:
    path = tmp_path / text
    path.parent.mkdir(parents=True)
    path.touch()
    assert location_of(text, str(tmp_path)).path == str(path)


@pytest.mark.parametrize("text", ["base.raw", "./base.raw", "../base.raw", "/none/base.raw", "images/base.raw"])
def test_what_may_be_a_path_is_one(tmp_path: Path, text: str) -> None:
    assert location_of(text, str(tmp_path)).kind == "file"


def test_a_path_relative_to_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base.raw").touch()
    (tmp_path / "overlays").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"relative to the overlay's folder; give it as {tmp_path}/base.raw"):
        location_of("base.raw", str(tmp_path / "overlays"))


def test_a_url_among_arguments() -> None:
    assert misplaced_url(["disk.qed", "http://host/x"]) == "http://host/x"
    assert misplaced_url(["NBD+unix:///?socket=/s"]) == "NBD+unix:///?socket=/s"
    assert misplaced_url(["disk.qed", "http.qed", "http:"]) is None
