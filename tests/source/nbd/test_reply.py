"""The reply parser alone: every case whole, byte by byte, in ragged pieces, cut at every byte, with junk behind it."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qedfs.source.nbd.coverage import Coverage
from qedfs.source.nbd.protocol import Refusal, RequestType, Violation
from qedfs.source.nbd.reply import BIN_SIZE, SCRATCH_SIZE, Replies, Request
from tests.fakes.nbd_behaviours import AFTER_A_READ, DESCRIBING, READING, WELL_BEHAVED
from tests.fakes.nbd_server import (
    CONTEXT_ID,
    NONE,
    READ,
    STATUS,
    Behaviour,
    Call,
    FakeNbd,
    chunk,
    data_chunk,
    error_chunk,
    hole_chunk,
    status_chunk,
)

POS = 1000
DATA = bytes(range(1, 101))
# What a buffer holds before: no case sends it, so untouched bytes show.
UNTOUCHED = b"\xee"


@dataclasses.dataclass
class Outcome:
    """What became of one request: its bytes or extents, or what was wrong."""

    buffer: bytes
    extents: list[tuple[int, bool]] | None
    failure: str | None = None
    violation: str | None = None
    finished: bool = False


def _pieces(data: bytes, cuts: Iterable[int]) -> Iterable[bytes]:
    start = 0
    for cut in [*sorted(cuts), len(data)]:
        yield data[start:cut]
        start = cut


def _hear(command: int, size: int, wire: Iterable[bytes], *, structured: bool = True) -> Outcome:
    buffer = bytearray(UNTOUCHED * size)
    woken: list[bool] = []
    replies = Replies(structured=structured, context=CONTEXT_ID)
    view = memoryview(buffer) if command == READ else None
    request = Request(RequestType(command), 1, POS, size, view, lambda: woken.append(True))
    replies.expect(request)
    outcome = Outcome(b"", None)
    try:
        for piece in wire:
            replies.feed(piece)
    except Violation as exc:
        outcome.violation = str(exc)
    assert len(woken) == request.finished
    outcome.buffer = bytes(buffer)
    outcome.extents = request.extents
    outcome.failure = str(request.failure) if request.failure is not None else None
    outcome.finished = request.finished
    return outcome


def _wire(behaviour: Behaviour, command: int, data: bytes) -> bytes:
    hook = behaviour.read if command == READ else behaviour.status
    call = Call(command, 1, POS, len(data), data)
    return (hook or FakeNbd(bytes(POS) + data, behaviour).answer)(call)


@pytest.mark.parametrize("name", [name for name, each in WELL_BEHAVED.items() if not each.silent])
@pytest.mark.parametrize("data", [DATA, bytes(33) + DATA[:33] + bytes(34), bytes(99)], ids=["data", "mixed", "zeros"])
def test_good_replies_however_they_arrive(name: str, data: bytes) -> None:
    behaviour = WELL_BEHAVED[name]
    wire = _wire(behaviour, READ, data)
    for pieces in ([wire], [bytes([byte]) for byte in wire], _pieces(wire, range(7, len(wire), 13))):
        outcome = _hear(READ, len(data), pieces, structured=behaviour.structured)
        assert outcome == Outcome(data, None, finished=True)
    for cut in range(len(wire)):
        outcome = _hear(READ, len(data), [wire[:cut]], structured=behaviour.structured)
        assert (outcome.violation, outcome.finished) == (None, False), cut
    outcome = _hear(READ, len(data), [wire + b"\xff" * 20], structured=behaviour.structured)
    assert outcome.finished
    assert outcome.buffer == data
    assert outcome.violation is not None


def _bad_cases() -> list[tuple[str, Behaviour, int]]:
    reads = [(name, each, READ) for name, each in READING.items() if not each.hangs_up]
    return reads + [(name, each, STATUS) for name, each in DESCRIBING.items()]


@pytest.mark.parametrize(("behaviour", "command"), [pytest.param(b, c, id=n) for n, b, c in _bad_cases()])
def test_bad_replies_however_they_arrive(behaviour: Behaviour, command: int) -> None:
    # Enough bytes that one-byte pieces with gaps between them are too many.
    size = 4096 if "scattered" in behaviour.says else len(DATA)
    data = (DATA * 41)[:size]
    wire = _wire(behaviour, command, data)
    for pieces in ([wire], [bytes([byte]) for byte in wire], _pieces(wire, range(5, len(wire), 11))):
        outcome = _hear(command, size, pieces, structured=behaviour.structured)
        said = outcome.violation or outcome.failure
        assert said is not None
        assert behaviour.says in said
        assert outcome.finished is (outcome.violation is None)
        assert all(got in (want, UNTOUCHED[0]) for got, want in zip(outcome.buffer, data, strict=True))


@pytest.mark.parametrize("behaviour", AFTER_A_READ.values(), ids=AFTER_A_READ)
def test_what_follows_a_good_reply_is_judged_too(behaviour: Behaviour) -> None:
    outcome = _hear(READ, len(DATA), [_wire(behaviour, READ, DATA)])
    assert outcome.finished
    assert outcome.buffer == DATA
    assert outcome.violation is not None
    assert behaviour.says in outcome.violation


def test_replies_in_another_order_than_the_requests() -> None:
    buffers = [bytearray(50) for _ in range(3)]
    replies = Replies(structured=True, context=None)
    for number, buffer in enumerate(buffers):
        replies.expect(Request(RequestType.READ, number, number * 50, 50, memoryview(buffer), lambda: None))
    wire = data_chunk(2, 100, b"c" * 50)
    # Chunks of different replies may be interleaved.
    wire += data_chunk(0, 0, b"a" * 20, done=False) + data_chunk(1, 50, b"b" * 50) + data_chunk(0, 20, b"A" * 30)
    replies.feed(wire)
    assert buffers == [b"a" * 20 + b"A" * 30, b"b" * 50, b"c" * 50]
    assert not replies.in_flight
    assert replies.finished == 3


def test_error_text_is_made_safe_to_print() -> None:
    outcome = _hear(READ, 10, [error_chunk(1, 5, b"a\nb\x1b[31m\xff" + b"x" * 4000)])
    assert outcome.failure is not None
    assert outcome.failure.isprintable()
    assert len(outcome.failure) < 300


def test_the_first_error_of_a_reply_counts() -> None:
    wire = error_chunk(1, 22, done=False) + error_chunk(1, 5, done=False) + chunk(NONE, 1)
    outcome = _hear(READ, 10, [wire])
    assert outcome.failure == "the server reported EINVAL"


def test_extents_are_merged_and_clipped_and_a_hole_is_not_zero() -> None:
    hole_only, zero_only, both = 1, 2, 3
    wire = status_chunk(1, [(10, both), (5, zero_only), (5, hole_only), (5, 0), (1000, both)])
    outcome = _hear(STATUS, 100, [wire])
    assert outcome.extents == [(15, True), (10, False), (75, True)]


def test_only_the_first_of_very_many_extents_are_looked_at() -> None:
    wire = status_chunk(1, [(1, 3 * (at % 2)) for at in range(20_000)])
    outcome = _hear(STATUS, 20_000, [wire])
    assert outcome.extents is not None
    assert sum(size for size, _ in outcome.extents) == 8192


@pytest.mark.parametrize("size", [100, BIN_SIZE - 1, BIN_SIZE, 3 * BIN_SIZE + 5])
@pytest.mark.parametrize("arrived", [0, 10, 28, 29, 90])
def test_an_abandoned_reply_goes_into_the_bin(size: int, arrived: int) -> None:
    buffer, other = bytearray(UNTOUCHED * size), bytearray(50)
    replies = Replies(structured=True, context=None)
    request = Request(RequestType.READ, 1, 0, size, memoryview(buffer), lambda: pytest.fail("nobody waits"))
    replies.expect(request)
    replies.expect(Request(RequestType.READ, 2, 0, 50, memoryview(other), lambda: None))
    wire = data_chunk(1, 0, b"x" * (size - 1), done=False) + hole_chunk(1, size - 1, 1) + data_chunk(2, 0, b"y" * 50)
    replies.feed(wire[:arrived])
    before = bytes(buffer)
    replies.abandon(request)
    _receive(replies, wire[arrived:])
    assert buffer == before
    assert other == b"y" * 50
    assert not replies.in_flight


def _receive(replies: Replies, data: bytes) -> None:
    """As a socket does it: fill all the buffers offered, in order, as far as the data goes."""
    while data:
        count = 0
        for buffer in replies.buffers():
            part = data[count : count + len(buffer)]
            buffer[: len(part)] = part
            count += len(part)
        replies.received(count)
        data = data[count:]


def test_payload_beyond_the_scratch_buffer_lands_without_a_copy() -> None:
    size = 10 * SCRATCH_SIZE
    target = bytearray(size)
    replies = Replies(structured=True, context=None)
    replies.expect(Request(RequestType.READ, 1, 0, size, memoryview(target), lambda: None))
    replies.feed(data_chunk(1, 0, b"z" * size)[:SCRATCH_SIZE])
    payload, scratch = replies.buffers()
    assert payload.obj is target
    assert len(payload) == size - (SCRATCH_SIZE - 28)
    assert len(scratch) == SCRATCH_SIZE


@given(
    st.lists(
        st.one_of(
            st.binary(max_size=40),
            st.builds(
                lambda magic, flags, kind, cookie, size: struct.pack(">IHHQI", magic, flags, kind, cookie, size),
                st.sampled_from([0x668E33EF, 0x67446698]),
                st.integers(0, 3),
                st.sampled_from([0, 1, 2, 5, 2**15 + 1, 2**15 + 2]),
                st.integers(0, 3),
                st.integers(0, 64),
            ),
            st.builds(data_chunk, st.integers(1, 2), st.integers(POS - 1, POS + 9), st.binary(max_size=9)),
            st.builds(hole_chunk, st.integers(1, 2), st.integers(POS - 1, POS + 9), st.integers(0, 9)),
        ),
        max_size=8,
    ),
    st.booleans(),
)
def test_anything_is_a_result_or_a_violation(wire: list[bytes], structured: bool) -> None:
    guarded = bytearray(UNTOUCHED * 30)
    replies = Replies(structured=structured, context=CONTEXT_ID)
    first = Request(RequestType.READ, 1, POS, 10, memoryview(guarded)[10:20], lambda: None)
    second = Request(RequestType.BLOCK_STATUS, 2, POS, 10, None, lambda: None)
    replies.expect(first)
    replies.expect(second)
    try:
        for piece in wire:
            _receive(replies, piece)
    except Violation:
        pass
    assert guarded[:10] == guarded[20:] == UNTOUCHED * 10
    if first.finished and first.failure is None:
        assert first.coverage.total == 10
    assert first.failure is None or isinstance(first.failure, Refusal)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 8)), max_size=30))
def test_coverage_agrees_with_a_set_of_bytes(ranges: list[tuple[int, int]]) -> None:
    coverage, seen = Coverage(), set[int]()
    for start, size in ranges:
        new = set(range(start, start + size))
        if seen & new:
            with pytest.raises(Violation, match="twice"):
                coverage.add(start, start + size)
            return
        coverage.add(start, start + size)
        seen |= new
        assert coverage.total == len(seen)
