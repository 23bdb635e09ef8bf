"""The same hostile HTTP answers given to qemu-io, to nbdkit's curl plugin and to qedfs, one read each.

The server answers HEAD and, until it is told otherwise, ranges as it should, so each of the three opens it without a
complaint. Then it lies.
"""

from __future__ import annotations

import contextlib
import http.server
import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from qedfs.overlay.create import create_overlay
from tests.faults.hostile import IMAGE_SIZE, content
from tests.harness.hang import HANG_SECONDS
from tests.harness.mounts import mounted
from tests.harness.require import require
from tests.mount.support import read_direct

# What is read; no reader has looked there before.
POS, SIZE = 10 << 16, 4096
_LINE = re.compile(r"^[0-9a-f]{8,}:  ((?:[0-9a-f]{2} )+)", re.MULTILINE)

LIES = {
    "200 and the whole file to a range request": "whole",
    "206 with another Content-Range": "elsewhere",
    "206 that is short but consistent with itself": "short",
    "206 cut short of its Content-Length": "cut",
}


class Verdicts(NamedTuple):
    """What each reader made of one lie: "right bytes", "wrong bytes" or "error"."""

    lie: str
    qemu: str
    nbdkit: str
    qedfs: str


class Liar(http.server.ThreadingHTTPServer):
    """Serves `content()`; `lie` is what it does with range requests, "" for right answers."""

    daemon_threads = True
    lie = ""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/disk.raw"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up on a lie is nothing to report."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Liar

    def do_HEAD(self) -> None:
        self._answer(200, b"", str(IMAGE_SIZE))

    def do_GET(self) -> None:
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        first, last = (int(found[1]), min(int(found[2]), IMAGE_SIZE - 1)) if found else (0, IMAGE_SIZE - 1)
        lie = self.server.lie
        if found is None or lie == "whole":
            self._answer(200, content(), str(IMAGE_SIZE))
            return
        if lie == "elsewhere":
            first, last = 0, last - first
        body = content()[first : last + 1]
        if lie == "short":
            body, last = body[: len(body) // 2], first + len(body) // 2 - 1
        length = str(len(body))
        self._answer(
            206, body[: len(body) // 2] if lie == "cut" else body, length, f"bytes {first}-{last}/{IMAGE_SIZE}"
        )
        self.close_connection = lie == "cut"

    def _answer(self, status: int, body: bytes, length: str, content_range: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", '"one"')
        self.send_header("Content-Length", length)
        if content_range is not None:
            self.send_header("Content-Range", content_range)
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quietly."""


def compare(folder: Path) -> list[Verdicts]:
    """Each lie told to each reader."""
    return [
        Verdicts(text, told_to_qemu_io(lie), told_to_nbdkit(lie), told_to_qedfs(lie, folder / f"{number}"))
        for number, (text, lie) in enumerate(LIES.items())
    ]


@contextlib.contextmanager
def _liar(lie: str) -> Iterator[Liar]:
    with Liar() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        server.lie = lie
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def told_to_qemu_io(lie: str) -> str:
    with _liar(lie) as server:
        return _judge([require("qemu-io"), "-r", "-f", "raw", "-c", f"read -v {POS} {SIZE}", server.url])


def told_to_nbdkit(lie: str) -> str:
    with _liar(lie) as server:
        read = f"{require('qemu-io')} -r -f raw -c 'read -v {POS} {SIZE}' $uri"
        return _judge([require("nbdkit"), "-U", "-", "curl", f"url={server.url}", "--run", read])


def _judge(argv: list[str]) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=HANG_SECONDS)
    found = b"".join(bytes.fromhex(line) for line in _LINE.findall(done.stdout))
    return _verdict(found) if len(found) == SIZE else "error"


def _verdict(found: bytes) -> str:
    return "right bytes" if found == content()[POS : POS + SIZE] else "wrong bytes"


def told_to_qedfs(lie: str, folder: Path) -> str:
    folder.mkdir()
    overlay = folder / "disk.qed"
    with _liar("") as server:
        create_overlay(str(overlay), image_size=IMAGE_SIZE, backing=server.url)
        with mounted(overlay, folder / "mnt", "--no-stream", "--source-timeout", "1s") as mount:
            image = mount.path("disk.raw")
            read_direct(image, 0, 4096)
            server.lie = lie
            try:
                return _verdict(read_direct(image, POS, SIZE))
            except OSError:
                return "error"
