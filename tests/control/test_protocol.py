"""The conversation: greeting, negotiation, ids, and QEMU's words for what is wrong."""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import trio

from qedfs.control import qmp
from qedfs.control.monitoring.metrics import exposition
from qedfs.errors import SourceError
from qedfs.source.url import parse_location
from tests.harness.hang import HANG_SECONDS

from .support import CLUSTER, MemorySource, controlled, talking


async def test_greeting_is_one_line_with_crlf(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (_, path), talking(path, negotiate=False) as talk:
        line = await talk.stream.receive_some(65536)
    assert line.endswith(b"\r\n")
    assert line.count(b"\n") == 1
    greeting = json.loads(line)["QMP"]
    assert greeting["capabilities"] == []
    assert greeting["version"]["qemu"] == {"major": 7, "minor": 2, "micro": 0}
    assert greeting["version"]["package"].startswith("qedfs")


async def test_negotiation_comes_first_and_once(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (_, path), talking(path, negotiate=False) as talk:
        await talk.line()
        assert await talk.error("query-version") == (
            "CommandNotFound",
            "Expecting capabilities negotiation with 'qmp_capabilities'",
        )
        assert await talk.error("qmp_capabilities", enable=["oob"]) == ("GenericError", "Capability oob not available")
        assert await talk.get("qmp_capabilities", enable=[]) == {}
        assert await talk.error("qmp_capabilities") == (
            "CommandNotFound",
            "Capabilities negotiation is already complete, command ignored",
        )
        assert (await talk.get("query-version"))["qemu"]["major"] == 7


@pytest.mark.parametrize("ident", [1, "x", None, [1, {"a": "\ud800"}], {"b": 1.5}, True, 12345678901234567890123])
async def test_ids_come_back_as_they_are(tmp_path: Path, ident: Any) -> None:
    async with controlled(tmp_path) as (_, path), talking(path) as talk:
        await talk.send(json.dumps({"execute": "query-version", "id": ident}))
        assert (await talk.reply())["id"] == ident
        await talk.send(json.dumps({"execute": "nonsense", "id": ident}))
        assert (await talk.reply())["id"] == ident
        await talk.send(json.dumps({"nonsense": 1, "id": ident}))
        assert (await talk.reply())["id"] == ident


async def test_answers_come_in_order_without_newlines_between(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (_, path), talking(path) as talk:
        await talk.send("".join(json.dumps({"execute": "query-version", "id": n}) for n in range(50)))
        assert [(await talk.reply())["id"] for _ in range(50)] == list(range(50))


@pytest.mark.parametrize(
    ("text", "desc"),
    [
        ("[]", "QMP input must be a JSON object"),
        ("12 ", "QMP input must be a JSON object"),
        ("{}", "QMP input lacks member 'execute'"),
        ('{"execute": 1}', "QMP input member 'execute' must be a string"),
        ('{"execute": "quit", "arguments": []}', "QMP input member 'arguments' must be an object"),
        ('{"execute": "quit", "x": 1}', "QMP input member 'x' is unexpected"),
        ('{"exec-oob": "quit"}', "QMP input member 'exec-oob' is unexpected"),
        ('{"execute": "quit", "arguments": {"x": 1}}', "Parameter 'x' is unexpected"),
        ('{"execute": "block-stream"}', "Parameter 'device' is missing"),
        (
            '{"execute": "block-stream", "arguments": {"device": 1}}',
            "Invalid parameter type for 'device', expected: string",
        ),
        (
            '{"execute": "block-stream", "arguments": {"device": "d", "speed": "1"}}',
            "Invalid parameter type for 'speed', expected: integer",
        ),
        (
            '{"execute": "block-stream", "arguments": {"device": "d", "speed": true}}',
            "Invalid parameter type for 'speed', expected: integer",
        ),
        (
            '{"execute": "block-stream", "arguments": {"device": "d", "auto-dismiss": 1}}',
            "Invalid parameter type for 'auto-dismiss', expected: boolean",
        ),
        (
            '{"execute": "block-stream", "arguments": {"device": "d", "on-error": "zz"}}',
            "Parameter 'on-error' does not accept value 'zz'",
        ),
        (
            '{"execute": "block-stream", "arguments": {"device": "zzz"}}',
            "Cannot find device='zzz' nor node-name='zzz'",
        ),
    ],
)
async def test_texts_for_bad_requests(tmp_path: Path, text: str, desc: str) -> None:
    async with controlled(tmp_path) as (_, path), talking(path) as talk:
        await talk.send(text)
        assert await talk.reply() == {"error": {"class": "GenericError", "desc": desc}}
        assert "return" in await talk.ask("query-version")


async def test_unknown_command(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (_, path), talking(path) as talk:
        assert await talk.error("x-nonsense") == ("CommandNotFound", "The command x-nonsense has not been found")


async def test_garbage_is_answered_and_the_connection_stays(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (_, path), talking(path) as talk:
        for garbage in (b"hello\n", b'{"execute": }', b"\x00", b'{"a":"\xff', b"}", b'{"a":"\xc3("}'):
            await talk.send(garbage)
            answer = await talk.reply()
            assert answer["error"]["class"] == "GenericError"
            assert answer["error"]["desc"].startswith("JSON parse error")
            assert "id" not in answer
        assert "return" in await talk.ask("query-version")


async def test_large_messages_are_refused_and_the_connection_stays(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (_, path), talking(path) as talk:
        await talk.send(json.dumps({"execute": "quit", "id": "x" * (2 << 20)}))
        assert (await talk.reply())["error"]["desc"] == "JSON message size limit exceeded"
        assert "return" in await talk.ask("query-version")


async def test_quit_is_answered_first(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        assert await talk.get("quit") == {}
        with trio.fail_after(HANG_SECONDS):
            await mount.has_quit.wait()


async def test_quit_takes_effect_though_its_client_hangs_up(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path):
        async with talking(path) as talk:
            # Without a checkpoint between the two: the server finds the command and the end of the connection.
            os.write(talk.stream.socket.fileno(), b'{"execute":"quit"}')
            talk.stream.socket.close()
        with trio.fail_after(HANG_SECONDS):
            await mount.has_quit.wait()


async def test_quit_of_a_client_that_never_reads_takes_effect(tmp_path: Path) -> None:
    """`printf ... | socat -u - UNIX-CONNECT:control.sock`: greeting and both answers find nobody."""
    async with controlled(tmp_path) as (mount, path):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            client.sendall(b'{"execute":"qmp_capabilities"}{"execute":"query-version"}{"execute":"quit"}')
        with trio.fail_after(HANG_SECONDS):
            await mount.has_quit.wait()


async def test_commands_are_listed_and_described(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (_, path), talking(path) as talk:
        names = {command["name"] for command in await talk.get("query-commands")}
        assert {"qmp_capabilities", "quit", "block-stream", "job-cancel", "block-job-set-speed"} <= names
        schema = {entry["name"]: entry for entry in await talk.get("query-qmp-schema")}
    assert {name for name, entry in schema.items() if entry["meta-type"] == "command"} == names
    members = {member["name"]: member for member in schema[schema["block-stream"]["arg-type"]]["members"]}
    assert members["device"] == {"name": "device", "type": "str"}
    assert members["speed"] == {"name": "speed", "type": "int", "default": None}
    assert "enospc" in schema[members["on-error"]["type"]]["values"]
    # Every type that is referred to is there.
    types = {m["type"] for entry in schema.values() for m in entry.get("members", [])}
    types |= {entry[key] for entry in schema.values() for key in ("arg-type", "ret-type") if key in entry}
    assert types <= schema.keys()


def sent_events() -> set[str]:
    """The names of events in the sources of the server."""
    sources = [module.read_text() for module in Path(qmp.__path__[0]).glob("*.py")]
    return set(re.findall(r'self\._(?:emit|send)\("([A-Z_]+)"', "".join(sources)))


async def test_every_event_that_is_sent_is_described(tmp_path: Path) -> None:
    sent = sent_events()
    assert "BLOCK_JOB_COMPLETED" in sent, "the search finds how events are sent"
    async with controlled(tmp_path) as (_, path), talking(path) as talk:
        schema = await talk.get("query-qmp-schema")
    assert {entry["name"] for entry in schema if entry["meta-type"] == "event"} == sent


async def test_images_are_block_nodes(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        served = await mount.add("disk", MemorySource(bytes(3 * CLUSTER)))
        await mount.add("alone", None)
        mount.add_broken("bad", SourceError("no such thing"))
        nodes = {node["node-name"]: node for node in await talk.get("query-named-block-nodes")}
        devices = [block["device"] for block in await talk.get("query-block")]
    assert devices == ["alone", "disk"]
    disk = nodes["disk"]
    assert disk["drv"] == "qed"
    assert disk["file"] == served.path
    assert disk["backing_file_depth"] == 1
    assert disk["image"]["virtual-size"] == 3 * CLUSTER
    assert disk["image"]["backing-filename-format"] == "raw"
    assert "secret" not in json.dumps(nodes)
    assert "backing_file" not in nodes["alone"]


async def test_an_overlay_that_has_just_come_is_waited_for(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        mount.add_broken("new", None)
        (new,) = (await talk.get("x-qedfs-status"))["images"]
        assert (new["name"], new["served"], new["state"], new["error"]) == ("new.raw", False, "waiting", None)
        assert "may still be being copied" in new["reason"]
        assert (await talk.error("x-qedfs-pause", device="new"))[1] == f"Device 'new' cannot be served: {new['reason']}"
        assert b'qedfs_image_state{image="new.raw",state="waiting"} 1.0' in exposition(mount)


async def test_names_that_are_not_utf8_do_not_end_the_metrics(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, _):
        name = os.fsdecode(b"caf\xe9")
        served = await mount.add(name, MemorySource(bytes(CLUSTER)))
        mount.mountpoint = f"/mnt/{name}"
        assert served.image is not None
        assert served.image.fetch is not None
        served.image.fetch.remote.location = parse_location(f"/srv/{name}")
        text = exposition(mount).decode()
    assert 'mountpoint="/mnt/caf\\\\udce9"' in text
    assert 'qedfs_image_size_bytes{image="caf\\\\udce9.raw"} 4096.0' in text
    assert 'qedfs_image_state{image="caf\\\\udce9.raw",state="off"} 1.0' in text
    assert 'source="/srv/caf\\\\udce9"' in text


async def test_status_names_all_images_and_no_secret(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        await mount.add("disk", MemorySource(bytes(3 * CLUSTER)))
        mount.add_broken("bad", SourceError("no such thing"))
        status = await talk.get("x-qedfs-status")
    assert status["mountpoint"] == mount.mountpoint
    assert status["socket"] == str(path)
    bad, disk = status["images"]
    assert (bad["name"], bad["state"], bad["error"], bad["exit_code"]) == ("bad.raw", "broken", "no such thing", 4)
    assert (disk["name"], disk["state"], disk["populated"]) == ("disk.raw", "off", 0)
    assert (disk["size"], disk["total"], disk["rate"]) == (3 * CLUSTER, 3 * CLUSTER, 0)
    assert disk["eta_seconds"] is None
    assert disk["error"] is None
    assert disk["backing"].startswith("http://example.org/disk.img")
    assert "secret" not in json.dumps(status)
