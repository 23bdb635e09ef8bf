"""The same conversations with QEMU's storage daemon and with us: the same events in the same order, the same answers.

A script talks to a daemon that has the node `disk`, a QED overlay over a raw image. What differs by nature is made
equal: where a job stands is "all" of its length or "not all", and what it failed with is told.
"""

from __future__ import annotations

import contextlib
import json
import random
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from qedfs.errors import NoSpace, QedfsError, SourceUnreachable
from tests.harness.process import Child, listening
from tests.harness.require import require

from .support import MemorySource, Talk, controlled, short, talking

SIZE = 4 << 20
FAULTY = 1 << 20  # the position that cannot be read
SLOW = 1000  # bytes per second: QEMU's first request leaves at once, and the next one minutes later
FAULTS: dict[int, QedfsError] = {5: SourceUnreachable("Input/output error"), 28: NoSpace("No space left on device")}


class Conversation:
    """One client of one daemon, and a transcript of what it was told."""

    def __init__(self, talk: Talk, mend: Callable[[], None]) -> None:
        self.answers: list[Any] = []
        self.mend = mend  # the fault in the backing is gone from now on
        self._talk = talk

    @property
    def events(self) -> list[tuple[str, Any]]:
        """Every event so far, with its data."""
        return [(short(event), _plain(event["data"])) for event in self._talk.events]

    async def ask(self, command: str, **arguments: Any) -> None:
        answer = await self._talk.ask(command, **arguments)
        self.answers.append((command, _plain(answer)))

    async def until(self, word: str) -> None:
        """Wait for an event, or a status of the job."""
        while not any(short(event) == word for event in self._talk.events):
            message = await self._talk.line()
            assert "event" in message, message
            self._talk.events.append(message)


def _plain(value: Any) -> Any:
    """The value without what may differ."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    found = {key: _plain(item) for key, item in value.items()}
    for at, of in (("offset", "len"), ("current-progress", "total-progress")):
        if {at, of} <= found.keys():
            found[at] = "all" if found[at] == found[of] else "not all"
    if found.get("status") == "running":
        found.pop("busy", None)  # it may sleep at this moment
    if isinstance(found.get("error"), str):
        # QEMU counts what it has passed over to be brought in.
        found |= {"error": "told"} | {at: "told" for at in ("offset", "current-progress") if at in found}
    return found


Script = Callable[[Conversation], Awaitable[None]]


async def success(talk: Conversation) -> None:
    await talk.ask("block-stream", device="disk", job_id="j0", speed=1 << 30)
    await talk.until("null")
    await talk.ask("query-block-jobs")
    await talk.ask("query-jobs")


async def cancel(talk: Conversation) -> None:
    await talk.ask("block-stream", device="disk", job_id="j0", speed=SLOW)
    await talk.until("running")
    await talk.ask("block-job-cancel", device="j0")
    await talk.until("null")
    await talk.ask("query-block-jobs")


async def cancel_and_look(talk: Conversation) -> None:
    await talk.ask("block-stream", device="disk", job_id="j0", speed=SLOW, auto_dismiss=False)
    await talk.until("running")
    await talk.ask("job-cancel", id="j0")
    await talk.until("concluded")
    await talk.ask("job-cancel", id="j0")
    await talk.ask("job-dismiss", id="j0")
    await talk.until("null")


async def pause_and_resume(talk: Conversation) -> None:
    await talk.ask("block-stream", device="disk", job_id="j0", speed=SLOW)
    await talk.until("running")
    await talk.ask("job-resume", id="j0")
    await talk.ask("job-pause", id="j0")
    await talk.ask("block-job-pause", device="j0")
    await talk.until("paused")
    await talk.ask("query-block-jobs")
    await talk.ask("query-jobs")
    await talk.ask("block-job-cancel", device="j0")
    await talk.ask("block-job-set-speed", device="j0", speed=0)
    await talk.ask("job-resume", id="j0")
    await talk.until("null")


async def resume_and_look(talk: Conversation) -> None:
    await talk.ask("block-stream", device="disk", job_id="j0", speed=SLOW)
    await talk.ask("job-pause", id="j0")
    await talk.until("paused")
    await talk.ask("block-job-resume", device="j0")
    await talk.ask("query-block-jobs")
    await talk.ask("block-job-resume", device="j0")
    await talk.ask("job-cancel", id="j0")
    await talk.until("null")


async def cancel_while_paused(talk: Conversation) -> None:
    await talk.ask("block-stream", device="disk", job_id="j0", speed=SLOW)
    await talk.ask("job-pause", id="j0")
    await talk.until("paused")
    await talk.ask("job-cancel", id="j0")
    await talk.until("null")


async def cancel_by_force_while_paused(talk: Conversation) -> None:
    await talk.ask("block-stream", device="disk", job_id="j0", speed=SLOW)
    await talk.ask("job-pause", id="j0")
    await talk.until("paused")
    await talk.ask("block-job-cancel", device="j0", force=True)
    await talk.until("null")


async def finalize_and_dismiss(talk: Conversation) -> None:
    await talk.ask("block-stream", device="disk", job_id="j0", auto_finalize=False, auto_dismiss=False)
    await talk.until("BLOCK_JOB_PENDING")
    await talk.ask("query-block-jobs")
    await talk.ask("query-jobs")
    for verb in ("pause", "resume", "complete", "dismiss"):
        await talk.ask(f"job-{verb}", id="j0")
    await talk.ask("block-job-set-speed", device="j0", speed=1)
    await talk.ask("job-finalize", id="j0")
    await talk.until("concluded")
    await talk.ask("query-block-jobs")
    await talk.ask("query-jobs")
    for verb in ("pause", "resume", "cancel", "complete", "finalize"):
        await talk.ask(f"job-{verb}", id="j0")
    await talk.ask("block-job-cancel", device="j0")
    await talk.ask("block-job-dismiss", id="j0")
    await talk.until("null")
    await talk.ask("query-jobs")


async def cancel_while_pending(talk: Conversation) -> None:
    await talk.ask("block-stream", device="disk", job_id="j0", auto_finalize=False)
    await talk.until("BLOCK_JOB_PENDING")
    await talk.ask("job-cancel", id="j0")
    await talk.until("null")


async def nothing_to_do(talk: Conversation) -> None:
    await talk.ask("block-stream", device="disk", job_id="j0", bottom="disk")
    await talk.until("null")


async def second_job(talk: Conversation) -> None:
    await talk.ask("block-stream", device="disk", job_id="j0", speed=SLOW)
    await talk.until("running")
    await talk.ask("block-stream", device="disk", job_id="j1")
    await talk.ask("block-stream", device="disk", job_id="j0")
    await talk.ask("job-complete", id="j0")
    await talk.ask("job-finalize", id="j0")
    await talk.ask("job-dismiss", id="j0")
    await talk.ask("block-job-set-speed", device="j0", speed=-1)
    await talk.ask("job-cancel", id="j0")
    await talk.until("null")


async def refusals(talk: Conversation) -> None:
    for arguments in (
        {"device": "nope"},
        {"base": "nope"},
        {"base_node": "nope"},
        {"base_node": "disk"},
        {"bottom": "nope"},
        {"base": "a", "base_node": "disk"},
        {"base": "a", "bottom": "disk"},
        {"base_node": "a", "bottom": "disk"},
        {"backing_file": "x"},
        {"job_id": "bad id!"},
        {"on_error": "nope"},
        {"auto_dismiss": 1},
    ):
        await talk.ask("block-stream", **{"device": "disk", "job_id": "j0", **arguments})
    await talk.ask("query-jobs")
    for verb in ("pause", "resume", "cancel", "complete", "finalize", "dismiss"):
        await talk.ask(f"job-{verb}", id="j")
        await talk.ask(f"block-job-{verb}", **{"id" if verb in ("finalize", "dismiss") else "device": "j"})


async def error_is_reported(talk: Conversation) -> None:
    await talk.ask("block-stream", device="disk", job_id="j0", auto_dismiss=False)
    await talk.until("concluded")
    await talk.ask("query-block-jobs")
    await talk.ask("query-jobs")
    await talk.ask("job-dismiss", id="j0")
    await talk.until("null")


async def error_stops(talk: Conversation, policy: str = "stop") -> None:
    await talk.ask("block-stream", device="disk", job_id="j0", on_error=policy)
    await talk.until("BLOCK_JOB_ERROR")
    talk.mend()
    await talk.ask("query-block-jobs")
    await talk.until("paused")
    await talk.ask("query-block-jobs")
    await talk.ask("job-resume", id="j0")
    await talk.until("null")


async def error_that_is_not_enospc(talk: Conversation) -> None:
    await talk.ask("block-stream", device="disk", job_id="j0", on_error="enospc")
    await talk.until("null")


async def enospc_stops(talk: Conversation) -> None:
    await error_stops(talk, "enospc")


async def auto_stops_on_enospc(talk: Conversation) -> None:
    await error_stops(talk, "auto")


async def enospc_is_reported(talk: Conversation) -> None:
    await talk.ask("block-stream", device="disk", job_id="j0", on_error="report")
    await talk.until("null")


async def error_is_ignored(talk: Conversation) -> None:
    await talk.ask("block-stream", device="disk", job_id="j0", on_error="ignore")
    await talk.until("null")


SCRIPTS: list[tuple[Script, int]] = [
    *((script, 0) for script in (success, cancel, cancel_and_look, pause_and_resume, resume_and_look)),
    *((script, 0) for script in (cancel_while_paused, cancel_by_force_while_paused, finalize_and_dismiss)),
    *((script, 0) for script in (cancel_while_pending, nothing_to_do, second_job, refusals)),
    *((script, 5) for script in (error_is_reported, error_stops, error_that_is_not_enospc, error_is_ignored)),
    *((script, 28) for script in (enospc_stops, auto_stops_on_enospc, enospc_is_reported)),
]


@pytest.mark.expect_log("the stream has stopped")
@pytest.mark.parametrize(("script", "fault"), SCRIPTS, ids=lambda value: getattr(value, "__name__", ""))
async def test_the_same_as_qemu(tmp_path: Path, script: Script, fault: int) -> None:
    """`fault`: the errno that the backing gives at one position, once; 0 for none."""
    content = random.Random(1).randbytes(SIZE)
    (tmp_path / "ours").mkdir()
    (tmp_path / "theirs").mkdir()
    async with _theirs(tmp_path / "theirs", content, fault) as talk:
        await script(talk)
        expected = talk.answers, talk.events
    async with _ours(tmp_path / "ours", content, fault) as talk:
        await script(talk)
        assert talk.answers == expected[0]
        assert talk.events == expected[1]


@contextlib.asynccontextmanager
async def _ours(folder: Path, content: bytes, fault: int) -> AsyncIterator[Conversation]:
    source = MemorySource(content)
    if fault:
        source.failures[FAULTY] = FAULTS[fault]
    async with controlled(folder) as (mount, path):
        await mount.add("disk", source)
        async with talking(path) as talk:
            yield Conversation(talk, source.failures.clear)


@contextlib.asynccontextmanager
async def _theirs(folder: Path, content: bytes, fault: int) -> AsyncIterator[Conversation]:
    overlay, raw = folder / "disk.qed", folder / "raw"
    raw.write_bytes(content)
    words: list[str | Path] = [require("qemu-img"), "create", "-q", "-f", "qed", "-F", "raw", "-b", raw, overlay]
    await trio.run_process(words)
    nodes: list[dict[str, Any]] = [
        {"node-name": "raw", "driver": "file", "filename": str(raw)},
        *([_faulty(fault)] if fault else []),
        {"node-name": "base", "driver": "raw", "file": "faulty" if fault else "raw"},
        {"node-name": "file", "driver": "file", "filename": str(overlay)},
        {"node-name": "disk", "driver": "qed", "file": "file", "backing": "base"},
    ]
    with tempfile.TemporaryDirectory(prefix="qedfs-") as short_path:
        path = Path(short_path, "qmp")
        words = [require("qemu-storage-daemon")]
        words += [word for node in nodes for word in ("--blockdev", json.dumps(node))]
        words += ["--chardev", f"socket,id=qmp,path={path},server=on,wait=off", "--monitor", "chardev=qmp"]
        daemon = Child(words, folder / "log")
        try:
            daemon.wait_until(lambda: listening(path), "socket")
            async with talking(path) as talk:
                yield Conversation(talk, lambda: None)
        finally:
            daemon.stop()


def _faulty(fault: int) -> dict[str, Any]:
    injected = {"event": "read_aio", "sector": FAULTY // 512, "errno": fault, "once": True}
    return {"node-name": "faulty", "driver": "blkdebug", "image": "raw", "inject-error": [injected]}
