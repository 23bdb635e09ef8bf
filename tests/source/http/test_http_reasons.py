"""What stood in the way of an answer over HTTP, as it is counted: each kind of trouble under its own name."""

from __future__ import annotations

import pycurl
import pytest

from qedfs.errors import Reason, SourceUnreachable
from qedfs.source.http import handle
from qedfs.source.http.errors import source_error
from tests.fakes.http_server import FakeHttpServer
from tests.harness.process import free_port
from tests.source.http.conftest import OpenSource, read

REASONS = {
    Reason.ANSWER: [
        *("wrong-start", "wrong-end", "no-content-range", "garbled-content-range", "multipart"),
        *("short-content-length", "long-content-length", "short-chunked-clean", "long-chunked", "until-close"),
        *("garbage", "garbled-header", "huge-header", "endless-header"),
    ],
    Reason.CUT: ["short-body", "short-chunked", "close-at-once", "reset", "half-close"],
    Reason.SERVER: ["retry-after-seconds", *(f"status-{code}" for code in (408, 425, 429, 500, 502, 503, 504, 507))],
    Reason.TIMEOUT: ["silence", "slow-body"],
}


@pytest.mark.parametrize(
    ("behaviour", "reason"), [(name, reason) for reason, names in REASONS.items() for name in names]
)
async def test_of_a_read(
    server: FakeHttpServer, open_source: OpenSource, monkeypatch: pytest.MonkeyPatch, behaviour: str, reason: Reason
) -> None:
    monkeypatch.setattr(handle, "STALL_SECONDS", 1)
    source = await open_source(server.url())
    server.behaviour = behaviour
    with pytest.raises(SourceUnreachable) as caught:
        await read(source, 1000, 65536)
    assert caught.value.reason is reason


@pytest.mark.parametrize(
    "url",
    [f"http://127.0.0.1:{free_port()}/disk.raw", "http://nowhere.invalid/disk.raw"],
    ids=["no listener", "no name"],
)
async def test_without_a_connection(open_source: OpenSource, url: str) -> None:
    with pytest.raises(SourceUnreachable) as caught:
        await open_source(url)
    assert caught.value.reason is Reason.CONNECT


@pytest.mark.parametrize(
    ("code", "reason"),
    [(pycurl.E_SSL_CONNECT_ERROR, Reason.CONNECT), (pycurl.E_SEND_ERROR, Reason.CUT), (9999, Reason.OTHER)],
)
def test_of_what_libcurl_says(code: int, reason: Reason) -> None:
    error = source_error(code, 0, "http://host/")
    assert isinstance(error, SourceUnreachable)
    assert error.reason is reason
