"""The handshake's dialogue alone, against recorded answers."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qedfs.source.nbd.handshake import Dialogue, Step, negotiate
from qedfs.source.nbd.protocol import MAX_REQUEST_SIZE, Export, Negotiated, Refusal, Violation
from tests.fakes.nbd_server import (
    ACK,
    GREETING,
    INFO,
    META_CONTEXT,
    OPTION_GO,
    OPTION_META,
    OPTION_STARTTLS,
    OPTION_STRUCTURED,
    UNSUPPORTED,
    option_reply,
)

CONTEXT = option_reply(OPTION_META, META_CONTEXT, struct.pack(">I", 9) + b"base:allocation")
GO = option_reply(OPTION_GO, INFO, struct.pack(">HQH", 0, 8192, 1 | 1 << 8))
GO += option_reply(OPTION_GO, INFO, struct.pack(">H", 1) + b"a name that nobody asked for")
GO += option_reply(OPTION_GO, INFO, struct.pack(">HIII", 3, 512, 4096, 65536)) + option_reply(OPTION_GO, ACK)
SERVER = GREETING + b"\0\3" + option_reply(OPTION_STRUCTURED, ACK) + CONTEXT + option_reply(OPTION_META, ACK) + GO


class Starved(Exception):
    """The dialogue wants more bytes than there are."""


def _drive(dialogue: Dialogue, server: bytes) -> tuple[Negotiated, bytes, list[bytes | Step]]:
    """Run the dialogue; returns its result, what it left unread, and what it said."""
    said: list[bytes | Step] = []
    answer = b""
    step = next(dialogue)
    while True:
        if isinstance(step, int):
            if len(server) < step:
                raise Starved
            answer, server = server[:step], server[step:]
        else:
            said.append(step)
        try:
            step = dialogue.send(answer)
        except StopIteration as end:
            return end.value, server, said


def test_everything_offered_is_agreed_on() -> None:
    negotiated, rest, said = _drive(negotiate("dísk", tls=False), SERVER + b"junk")
    assert negotiated == Negotiated(8192, Export(1 | 1 << 8), True, 9, 512, 65536, block_sizes=(512, 4096, 65536))
    assert negotiated.multi_conn
    assert rest == b"junk"
    name = "dísk".encode()
    assert said[0] == b"\0\0\0\3"
    assert said[1] == b"IHAVEOPT" + struct.pack(">II", 8, 0)
    assert (
        said[2] == b"IHAVEOPT" + struct.pack(">III", 10, 32, 5) + name + struct.pack(">II", 1, 15) + b"base:allocation"
    )
    assert said[3] == b"IHAVEOPT" + struct.pack(">III", 7, 15, 5) + name + struct.pack(">HHH", 2, 3, 2)
    assert len(said) == 4


def test_a_modest_server_is_accepted() -> None:
    server = GREETING + b"\0\1" + option_reply(OPTION_STRUCTURED, 2**31 + 2**30)
    server += option_reply(OPTION_GO, INFO, struct.pack(">HQH", 0, 2**63 - 1, 0)) + option_reply(OPTION_GO, ACK)
    negotiated, rest, said = _drive(negotiate("", tls=False), server)
    assert negotiated == Negotiated(2**63 - 1, Export(0), False, None, 1, MAX_REQUEST_SIZE)
    assert rest == b""
    assert said[0] == b"\0\0\0\1", "no-zeroes must not be claimed when it was not offered"
    assert len(said) == 3, "without structured replies there is no context to ask for"


def test_an_unlimited_maximum_is_ours() -> None:
    blocks = option_reply(OPTION_GO, INFO, struct.pack(">HIII", 3, 1, 4096, 2**32 - 1))
    server = GREETING + b"\0\3" + option_reply(OPTION_STRUCTURED, UNSUPPORTED) + GO[:32] + blocks
    negotiated, _, _ = _drive(negotiate("", tls=False), server + option_reply(OPTION_GO, ACK))
    assert negotiated.maximum_request == MAX_REQUEST_SIZE


def test_every_cut_leaves_the_dialogue_waiting() -> None:
    for cut in range(len(SERVER)):
        with pytest.raises(Starved):
            _drive(negotiate("", tls=False), SERVER[:cut])


def test_nothing_is_said_in_the_clear_before_tls() -> None:
    server = GREETING + b"\0\3" + option_reply(OPTION_STARTTLS, ACK) + SERVER[18:]
    _, _, said = _drive(negotiate("secret-name", tls=True), server)
    start = said.index(Step.START_TLS)
    assert said[:start] == [b"\0\0\0\3", b"IHAVEOPT" + struct.pack(">II", OPTION_STARTTLS, 0)]
    assert len(said) > start + 1


@pytest.mark.parametrize("kind", [UNSUPPORTED, 2**31 + 2, 2**31 + 7, 99])
def test_a_server_that_will_not_start_tls_ends_the_dialogue(kind: int) -> None:
    server = GREETING + b"\0\3" + option_reply(OPTION_STARTTLS, kind) + SERVER[18:]
    with pytest.raises((Refusal, Violation), match="TLS"):
        _drive(negotiate("", tls=True), server)


def test_an_export_name_longer_than_the_protocol_allows() -> None:
    with pytest.raises(Refusal, match="longer than 4096"):
        _drive(negotiate("é" * 2049, tls=False), SERVER)


@given(st.integers(0, len(SERVER) - 1), st.integers(1, 255), st.booleans())
def test_one_wrong_byte_gives_a_result_or_a_declared_error(at: int, change: int, tls: bool) -> None:
    server = bytearray(SERVER)
    server[at] ^= change
    try:
        negotiated, _, _ = _drive(negotiate("", tls=tls), bytes(server))
    except (Starved, Violation, Refusal):
        return
    assert 0 <= negotiated.size < 2**63
    assert 1 <= negotiated.minimum_block <= 65536
    assert negotiated.size % negotiated.minimum_block == 0
    assert negotiated.maximum_request % negotiated.minimum_block == 0
