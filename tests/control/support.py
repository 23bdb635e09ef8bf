"""A mount without FUSE: real overlays, images and streams over sources in memory, and clients of its control socket."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import trio

from qedfs.control.port import Restart, ServedImage
from qedfs.control.qmp.server import serve_control
from qedfs.errors import QedfsError
from qedfs.fetch.queue import FetchQueue
from qedfs.fetch.total_limit import TotalLimit
from qedfs.image.condition import Cause, Trouble
from qedfs.image.growth import grow
from qedfs.image.image import Image
from qedfs.jobs.image_jobs import ImageJobs
from qedfs.jobs.stream import StreamJob
from qedfs.overlay.create import create_overlay
from qedfs.overlay.open import open_overlay
from qedfs.source.base import Extent, Identity
from qedfs.source.retrying import RetryingSource
from qedfs.source.url import parse_location
from tests.harness.hang import HANG_SECONDS

T = TypeVar("T")
CLUSTER = 4096
URL = "http://user:secret@example.org/disk.img?token=secret"


class MemorySource:
    """A source whose reads can be held back (`gate`) and made to fail (`failures`, by position)."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.identity = Identity(len(content))
        self.gate = trio.Event()
        self.gate.set()
        self.failures: dict[int, QedfsError] = {}
        self.asked = trio.Event()  # for the first time
        self.received = 0

    async def read(self, pos: int, buffer: memoryview, *, urgent: bool = False) -> None:
        self.asked.set()
        await self.gate.wait()
        await trio.lowlevel.checkpoint()
        for at, error in self.failures.items():
            if pos <= at < pos + len(buffer):
                raise error
        buffer[:] = self.content[pos : pos + len(buffer)]
        self.received += len(buffer)

    async def extents(self, pos: int, size: int) -> Sequence[Extent] | None:
        return None

    async def aclose(self) -> None:
        return


class AskedOnce(RetryingSource):
    """A failure is told at once. Any deadline short enough to wait for would be missed on a machine that is busy."""

    async def _retried(self, action: Callable[[], Awaitable[T]], *, patience: float = 1.0) -> T:
        try:
            return await action()
        except QedfsError as exc:
            self._error = exc
            raise


class Copied(NamedTuple):
    """What a snapshot returns."""

    file: str
    pause_seconds: float


@dataclasses.dataclass(eq=False)
class Served:
    name: str
    path: str
    image: Image | None = None
    job: StreamJob | None = None
    jobs: ImageJobs | None = None
    error: QedfsError | None = None
    opens: int = 0
    releasing: bool = False

    @property
    def troubles(self) -> list[Trouble]:
        if self.image is not None:
            return self.image.condition.troubles()
        return [] if self.error is None else [Trouble(Cause.NOT_SERVED, self.error, 0.0)]

    def is_complete(self) -> bool:
        assert self.image is not None
        return self.image.complete

    def is_paused(self) -> bool:
        assert self.image is not None
        return self.image.overlay.record.paused


class FakeMount:
    """What the control side wants of a mount."""

    mountpoint = "/mnt/images"
    device = "0:57"
    without_more = ""
    without_restart = ""
    without_upgrade = ""

    def __init__(self, folder: Path, nursery: trio.Nursery) -> None:
        self.folder = folder
        self.nursery = nursery
        self.served: list[Served] = []
        self.rescans = 0
        self.moved: list[tuple[str, str, bool]] = []
        self.populated: list[tuple[str, str, str | None, bool]] = []
        self.activated: list[tuple[str, bool]] = []  # name, dry
        self.has_quit = trio.Event()
        self.leaving: dict[str, str] = {}  # name -> overlay, of released images
        self.restart: Restart | None = None
        self.upgrades = 0
        self.total = TotalLimit()

    def everything(self) -> list[Served]:
        return sorted(self.served, key=lambda served: served.name)

    def fetches(self) -> list[FetchQueue]:
        return [served.image.fetch for served in self.served if served.image and served.image.fetch]

    async def rescan(self) -> None:
        self.rescans += 1

    async def activate(self, served: ServedImage, *, dry: bool = False) -> None:
        self.activated.append((served.name, dry))

    async def deactivate(self, served: ServedImage) -> None:
        self.activated.remove((served.name, False))

    async def resize(self, served: ServedImage, size: int) -> None:
        assert served.image is not None
        await grow(served.image, size)

    async def move_source(self, served: ServedImage, place: str, *, force: bool = False) -> None:
        self.moved.append((served.name, place, force))

    async def populate(
        self, served: ServedImage, place: str, *, backing_format: str | None = None, force: bool = False
    ) -> None:
        self.populated.append((served.name, place, backing_format, force))

    def released(self) -> dict[str, str]:
        return self.leaving

    async def release(self, served: ServedImage) -> bool:
        if served.opens:
            return False
        self.leaving[served.name] = served.path
        self.served = [other for other in self.served if other is not served]
        return True

    async def snapshot(self, served: ServedImage, file: str) -> Copied:
        return Copied(file, 0.25)

    async def take_back(self, name: str) -> bool:
        return self.leaving.pop(name, None) is not None

    async def upgrade(self) -> None:
        self.upgrades += 1

    def quit(self) -> None:
        self.has_quit.set()

    async def add(
        self, name: str, source: MemorySource | None, *, stream: bool = False, limit: int = 0, size: int | None = None
    ) -> Served:
        """An image `name`.raw over `source`, complete if there is none; its stream runs if `stream`.

        `size`: of the image, that of the source if not given.
        """
        path = self.folder / f"{name}.qed"
        if size is None:
            size = len(source.content) if source else 4 * CLUSTER
        create_overlay(str(path), image_size=size, backing=URL if source else None, cluster_size=CLUSTER)
        overlay = await open_overlay(str(path), writable=True)
        fetch = None
        if source is not None:

            async def connect() -> MemorySource:
                return source

            fetch = FetchQueue(AskedOnce(parse_location(URL), connect), CLUSTER, self.nursery)
        image = Image(f"{name}.raw", overlay, fetch)
        await overlay.count_missing()
        job = StreamJob(image, enabled=stream, limit=limit)
        jobs = ImageJobs(job)
        served = Served(f"{name}.raw", str(path), image, job, jobs)
        self.served.append(served)
        self.nursery.start_soon(job.run)
        self.nursery.start_soon(jobs.run)
        return served

    def add_broken(self, name: str, error: QedfsError | None) -> None:
        """An overlay that is not served: without an error, not yet."""
        self.served.append(Served(f"{name}.raw", str(self.folder / f"{name}.qed"), error=error))


@contextlib.asynccontextmanager
async def controlled(folder: Path) -> AsyncIterator[tuple[FakeMount, Path]]:
    """A mount whose control socket answers, and the socket's path."""
    with tempfile.TemporaryDirectory(prefix="qedfs-") as short:
        path = Path(short, "control", "control.sock")
        async with trio.open_nursery() as nursery:
            mount = FakeMount(folder, nursery)
            await nursery.start(serve_control, path, mount)
            try:
                yield mount, path
            finally:
                nursery.cancel_scope.cancel()
                with trio.CancelScope(shield=True):
                    for served in mount.served:
                        if served.image is not None:
                            await served.image.close()


class Talk:
    """A client that sees every line."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._buffer = b""
        self.events: list[dict[str, Any]] = []

    async def line(self) -> dict[str, Any]:
        """The next message, event or not."""
        with trio.fail_after(HANG_SECONDS):
            while b"\r\n" not in self._buffer:
                data = await self.stream.receive_some(65536)
                if not data:
                    raise EOFError
                self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\r\n")
        message: dict[str, Any] = json.loads(line)
        return message

    async def reply(self) -> dict[str, Any]:
        """The next answer; events on the way are kept."""
        while "event" in (message := await self.line()):
            self.events.append(message)
        return message

    async def send(self, text: str | bytes) -> None:
        await self.stream.send_all(text if isinstance(text, bytes) else text.encode())

    async def ask(self, name: str, **arguments: Any) -> dict[str, Any]:
        """The answer to a command; `_` in argument names stands for `-`."""
        named = {key.replace("_", "-"): value for key, value in arguments.items()}
        await self.send(json.dumps({"execute": name, "arguments": named}))
        return await self.reply()

    async def get(self, name: str, **arguments: Any) -> Any:
        """What a command returns."""
        answer = await self.ask(name, **arguments)
        assert "return" in answer, answer
        return answer["return"]

    async def error(self, name: str, **arguments: Any) -> tuple[str, str]:
        """(class, text) of what a command fails with."""
        answer = await self.ask(name, **arguments)
        assert "error" in answer, answer
        return answer["error"]["class"], answer["error"]["desc"]

    async def events_until(self, status: str, job_id: str) -> list[str]:
        """The events so far as short words, until the job has come to `status`."""
        while not any(e["data"].get("status") == status and e["data"].get("id") == job_id for e in self.events):
            message = await self.line()
            assert "event" in message, message
            self.events.append(message)
        return [short(event) for event in self.events]


def short(event: dict[str, Any]) -> str:
    """`running` for a change of state, the event's name for the others."""
    word: str = event["data"]["status"] if event["event"] == "JOB_STATUS_CHANGE" else event["event"]
    return word


@contextlib.asynccontextmanager
async def talking(path: Path, *, negotiate: bool = True) -> AsyncIterator[Talk]:
    """A client that is connected, and past the negotiation unless told otherwise."""
    async with await trio.open_unix_socket(str(path)) as stream:
        talk = Talk(stream)
        if negotiate:
            await talk.line()
            await talk.get("qmp_capabilities")
        yield talk
