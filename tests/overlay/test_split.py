"""Splitting at cluster borders: the pieces put together are the bytes again, each in its cluster."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qedfs.overlay.split import adopted_views, laid_out, partial_clusters, pieces, zero_bytes

CLUSTER = 16


@given(st.integers(0, 100), st.binary(max_size=100))
def test_pieces_stay_inside_their_clusters(pos: int, data: bytes) -> None:
    found = list(pieces(pos, memoryview(data), CLUSTER))
    assert b"".join(view for _, _, view in found) == data
    at = pos
    for cluster, start, view in found:
        assert (cluster * CLUSTER + start, len(view) > 0) == (at, True)
        assert start + len(view) <= CLUSTER
        at += len(view)


@given(st.sets(st.integers(0, 5), min_size=1), st.integers(0, CLUSTER - 1), st.data())
def test_what_is_laid_out_is_each_cluster_at_its_place(chosen: set[int], short: int, data: st.DataObject) -> None:
    buffer = bytearray(range(6 * CLUSTER))
    size = len(buffer) - short
    starts = [CLUSTER * cluster for cluster in sorted(chosen)]
    numbers = data.draw(st.lists(st.integers(0, 9), min_size=len(starts), max_size=len(starts), unique=True))
    places = [CLUSTER * number for number in sorted(numbers)]
    file = bytearray(b"\xff" * (10 * CLUSTER))
    writes = list(laid_out(places, buffer, size, starts, CLUSTER))
    for offset, buffers in writes:
        joined = b"".join(buffers)
        file[offset : offset + len(joined)] = joined
    whole = bytes(buffer[:size]) + bytes(short)
    for place, start in zip(places, starts, strict=True):
        assert file[place : place + CLUSTER] == whole[start : start + CLUSTER]
    rows = sum(1 for at, place in enumerate(places) if not at or place != places[at - 1] + CLUSTER)
    assert len(writes) == rows, "neighbours in the file are one write"


def test_neighbours_in_the_buffer_are_one_view() -> None:
    buffer = bytearray(4 * CLUSTER)
    assert [len(view) for view in adopted_views(buffer, 4 * CLUSTER, [0, 16, 48], CLUSTER)] == [32, 16]
    assert [len(view) for view in adopted_views(buffer, 4 * CLUSTER - 3, [0, 48], CLUSTER)] == [16, 13, 3]


def test_zeros_are_made_once() -> None:
    assert zero_bytes(CLUSTER) == bytes(CLUSTER)
    assert zero_bytes(CLUSTER) is zero_bytes(CLUSTER)


def test_partial_clusters_are_those_that_keep_other_bytes() -> None:
    image_size = 10 * 4096 + 512
    assert partial_clusters(0, 8192, 4096, image_size) == []
    assert partial_clusters(5, 10, 4096, image_size) == [0]
    assert partial_clusters(5, 3 * 4096, 4096, image_size) == [0, 3]
    assert partial_clusters(9 * 4096, 4096 + 512, 4096, image_size) == []
    assert partial_clusters(10 * 4096 + 1, 511, 4096, image_size) == [10]
