"""`nbd:host:port[:exportname=NAME]`: what QEMU wrote into overlays before there were NBD URIs, and still takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from qedfs.errors import Refused, UsageError
from qedfs.source.policy import Policy
from qedfs.source.url import parse_location
from tests.harness.images import qemu_same
from tests.harness.servers import qemu_nbd
from tests.source.nbd.support import opened, read

CONTENT = bytes(range(256)) * 1024
NAME = "a disk/50%?#@:"  # nothing in it is encoded, and all of it is sent


@pytest.mark.parametrize(
    ("text", "uri"),
    [
        ("nbd:host:10810", "nbd://host:10810/"),
        ("nbd:host:10809:exportname=disk", "nbd://host/disk"),
        ("nbd:[::1]:10809:exportname=disk", "nbd://[::1]/disk"),
        ("nbd:10.0.0.1:1:exportname=a/b c", "nbd://10.0.0.1:1/a/b%20c"),
        ("nbd:unix:/run/a b.sock", "nbd+unix:///?socket=/run/a%20b.sock"),
        ("nbd:unix:/run/a:b&c.sock:exportname=x=1", "nbd+unix:///x%3D1?socket=/run/a:b%26c.sock"),
    ],
)
def test_it_means_the_same_as_a_uri(text: str, uri: str) -> None:
    old, new = parse_location(text), parse_location(uri)
    assert (old.kind, old.host, old.port, old.export, old.path, old.tls) == (
        (new.kind, new.host, new.port, new.export, new.path, new.tls)
    )
    assert str(old) == text


@pytest.mark.parametrize(
    "text",
    [
        *("nbd:", "nbd:host", "nbd:host:", "nbd:host:0", "nbd:host:65536", "nbd::10809", "nbd:a:b:1", "nbd:h:1,to=9"),
        *("nbd:unix:", "nbd:unix:rel.sock", "nbd:user:pw@host:1", "nbd:/host:1", "nbd:host:1:export=x", "nbd:host:١"),
    ],
)
def test_what_does_not_make_sense(text: str) -> None:
    with pytest.raises(UsageError, match="backing 'nbd:"):
        parse_location(text)


def test_the_policy_counts() -> None:
    Policy(("nbd://host/a",)).check_location(parse_location("nbd:host:10809:exportname=a/b"))
    for text in ("nbd:host:10809:exportname=ab", "nbd:unix:/run/a.sock:exportname=a"):
        with pytest.raises(Refused):
            Policy(("nbd://host/a",)).check_location(parse_location(text))
    with pytest.raises(Refused, match=r"names the Unix socket /run/a\.sock"):
        Policy().check_location(parse_location("nbd:unix:/run/a.sock"))


@pytest.mark.parametrize("tcp", [True, False])
async def test_qemu_and_we_read_the_same(tmp_path: Path, tcp: bool) -> None:
    file = tmp_path / "disk"
    file.write_bytes(CONTENT)
    with qemu_nbd(file, tcp=tcp, export=NAME) as server:
        place = f"unix:{server.address}" if isinstance(server.address, Path) else "{}:{}".format(*server.address)
        text = f"nbd:{place}:exportname={NAME}"
        assert qemu_same(text, file, fmt="raw")
        async with opened(text) as source:
            assert await read(source, 1000, 5000) == CONTENT[1000:6000]
