"""Free buffers take a bounded amount of memory, whatever sizes come and however many sources there are."""

from __future__ import annotations

import random

from qedfs.fetch.buffer_pool import BufferPool


def test_a_buffer_is_used_again() -> None:
    buffers = BufferPool(1000)
    first = buffers.take(100)
    buffers.give(first)
    assert buffers.take(100) is first
    assert buffers.take(100) is not first
    assert buffers.kept_bytes == 0


def test_what_is_kept_is_bounded_over_all_sizes() -> None:
    buffers = BufferPool(1000)
    source = random.Random(0)
    out: list[bytearray] = []
    for _ in range(5000):
        if out and source.random() < 0.5:
            buffers.give(out.pop(source.randrange(len(out))))
        else:
            out.append(buffers.take(source.randrange(1, 300)))
        assert 0 <= buffers.kept_bytes <= 1000
        assert buffers.kept_bytes == sum(size * len(free) for size, free in buffers._free.items())


def test_sizes_that_nobody_asks_for_make_room() -> None:
    buffers = BufferPool(1000)
    old, new = buffers.take(600), buffers.take(500)
    buffers.give(old)
    buffers.give(new)
    assert buffers.take(500) is new
    assert buffers.take(600) is not old


def test_a_buffer_larger_than_all_room_is_not_kept() -> None:
    buffers = BufferPool(1000)
    kept = buffers.take(100)
    buffers.give(kept)
    buffers.give(bytearray(1001))
    assert buffers.take(100) is kept


def test_what_nobody_takes_for_a_while_is_forgotten() -> None:
    buffers = BufferPool(1000)
    taken = [buffers.take(100) for _ in range(3)] + [buffers.take(200)]
    for buffer in taken:
        buffers.give(buffer)
    buffers.forget_unused()
    assert buffers.kept_bytes == 500  # all of it has been used since the beginning
    two = [buffers.take(100), buffers.take(100)]
    for buffer in two:
        buffers.give(buffer)
    buffers.forget_unused()
    assert buffers.kept_bytes == 200
    again = buffers.take(100)
    assert any(again is buffer for buffer in two)
    buffers.forget_unused()
    assert buffers.kept_bytes == 0
    assert len(buffers.take(100)) == 100
