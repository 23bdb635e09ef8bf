"""What a file of credentials may say, and which place gets what of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from qedfs.errors import UsageError
from qedfs.source.credentials import NO_TLS_FILES, Credentials, TlsFiles, read_credentials
from qedfs.source.url import parse_location

CANARY = "kAnArI3nVoGeL"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "credentials.toml"
    path.touch(0o600)
    return path


def read(file: Path, text: str) -> Credentials:
    file.write_text(text)
    return read_credentials(str(file))


def test_all_that_there_is(file: Path) -> None:
    found = read(
        file,
        f"""
        ["https://gitlab.example/"]
        headers = {{ PRIVATE-TOKEN = "{CANARY}", "X-Empty" = "" }}
        ca = "/etc/ca.pem"
        certificate = "client.pem"
        key = "keys/client.pem"

        ["nbds://backup.example/disks"]
        psk-file = "psk"
        user = "alice"
        """,
    )
    entry = found.entry_for(parse_location("https://GitLab.example:443/a/b.raw"))
    assert entry.headers == (f"PRIVATE-TOKEN: {CANARY}", "X-Empty: ")
    folder = str(file.parent)
    assert entry.tls == TlsFiles(ca="/etc/ca.pem", certificate=f"{folder}/client.pem", key=f"{folder}/keys/client.pem")
    entry = found.entry_for(parse_location("nbds://backup.example/disks/1"))
    assert entry.tls == TlsFiles(psk_file=f"{folder}/psk", user="alice")
    assert CANARY not in repr(found)


@pytest.mark.parametrize(
    "url",
    [
        "http://host/a",
        "https://host:444/a",
        "https://host.evil/a",
        "https://host/ab",
        "https://host/%61/../b",
        "https://other/a",
        "nbds://host/a",
        "https://user@hosts/a",
    ],
)
def test_other_places_get_nothing(file: Path, url: str) -> None:
    found = read(file, '["https://host/a"]\nheaders = { X = "secret" }\ncertificate = "c"')
    entry = found.entry_for(parse_location(url))
    assert (entry.headers, entry.tls) == ((), NO_TLS_FILES)


def test_the_longest_prefix_counts(file: Path) -> None:
    found = read(
        file,
        '["https://host/"]\nheaders = { X = "1" }\n["https://host/a/b"]\nheaders = { X = "3" }\n'
        '["https://host/a"]\nheaders = { X = "2" }\n["nbds+unix:///d?socket=/run/x.sock"]\nuser = "u"\nca = "c"',
    )
    for url, value in [("https://host/", "1"), ("https://host/a/c", "2"), ("https://host/a/b/c?q", "3")]:
        assert found.entry_for(parse_location(url)).headers == (f"X: {value}",)
    assert found.entry_for(parse_location("nbds+unix:///d?socket=/run/x.sock")).tls.user == "u"
    for url in ("nbds+unix:///d?socket=/run/y.sock", "nbds+unix:///e?socket=/run/x.sock"):
        assert found.entry_for(parse_location(url)).tls.user is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f'["https://h/"]\nheaders = {{ X = "{CANARY} ', "is not TOML, end of document"),
        (f'["https://h/"]\nheaders = {{ X = {CANARY} }}', r"is not TOML, line 2, column \d+"),
        (f'["https://h/"]\nheaders = {{ X = "{CANARY}\\n" }}', "does not allow"),
        (f'["https://h/"]\nheaders = {{ "X Y" = "{CANARY}" }}', "does not allow"),
        (f'["https://h/"]\nheaders = {{ Range = "{CANARY}" }}', "qedfs sets the header Range itself"),
        (f'["https://h/"]\nheaders = {{ if-match = "{CANARY}" }}', "qedfs sets the header if-match itself"),
        (f'["https://h/"]\nheaders = "{CANARY}"', "headers are given as"),
        ('["https://h/"]\nheaders = { X = 1 }', "headers are given as"),
        (
            f'["https://h/"]\ntoken = "{CANARY}"',
            r"has the unknown key 'token'; known are ca, certificate, headers, key, psk-file, user",
        ),
        ('["https://h/"]\ncertificate = 1', "must be non-empty strings"),
        ('["https://h/"]\nkey = "k"', "a key without a certificate"),
        ('["https://h/"]\npsk-file = "k"', "https has no pre-shared keys"),
        ('["http://h/"]\ncertificate = "k"', "certificate is for https and nbds, which use TLS"),
        ('["nbd://h/"]\npsk-file = "k"', "psk-file is for https and nbds"),
        ('["nbds://h/"]\nheaders = { X = "1" }', "headers are for http and https"),
        ('["nbds://h/"]\npsk-file = "k"\nca = "c"', "not both"),
        ('["/srv/disk"]\n', "not a section for a URL"),
        (f'"https://u:{CANARY}@h/" = 1', r"\[https://h/\] is not a section"),
        (f'["ftp://u:{CANARY}@h/"]', "ftp: is not supported"),
    ],
)
def test_what_does_not_make_sense(file: Path, text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        read(file, text)
    assert str(file) in str(caught.value)
    error: BaseException | None = caught.value
    while error is not None:
        assert CANARY not in str(error)
        error = error.__cause__


def test_files_that_cannot_be_used(file: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_credentials(str(file) + ".not")
    file.write_bytes(b"# \xff")
    with pytest.raises(UsageError, match="not text in UTF-8"):
        read_credentials(str(file))
    file.write_text("")
    file.chmod(0o644)
    with pytest.raises(UsageError, match="is readable by everybody; chmod 600"):
        read_credentials(str(file))
    file.chmod(0o640)
    assert read_credentials(str(file)) == Credentials()
