"""Compressed bytes of every kind become a cluster or a Fault, and never more than a cluster."""

from __future__ import annotations

import importlib
import random
import sys
import tracemalloc
import types
import zlib

import pytest

from qedfs.source.qcow2.format import DEFLATE, ZSTD
from qedfs.source.qcow2.inflate import inflater
from qedfs.source.tables.faults import Fault
from tests.source.qcow2.build import deflated

CLUSTER = (b"some words of a cluster " * 4096)[:65536]


def test_deflate_with_what_follows_in_the_sector() -> None:
    inflate = inflater(DEFLATE)
    assert inflate(deflated(CLUSTER), len(CLUSTER)) == CLUSTER
    assert inflate(memoryview(deflated(CLUSTER) + b"\xff" * 511), len(CLUSTER)) == CLUSTER


def test_deflate_with_the_largest_window() -> None:
    noise = random.Random(1).randbytes(32768)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    assert inflater(DEFLATE)(packer.compress(noise * 2) + packer.flush(), 65536) == noise * 2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "holds 0 bytes instead of 65536"),
        (deflated(CLUSTER)[:-9], "holds .* bytes instead of 65536"),
        (deflated(CLUSTER[:-1]), "holds 65535 bytes"),
        (b"\xff" * 512, "is damaged"),
        (zlib.compress(CLUSTER), "is damaged"),
    ],
)
def test_damaged_deflate(data: bytes, message: str) -> None:
    with pytest.raises(Fault, match=message):
        inflater(DEFLATE)(data, 65536)


def test_bomb_costs_a_cluster() -> None:
    bomb = deflated(bytes(32 << 20))
    tracemalloc.start()
    try:
        assert inflater(DEFLATE)(bomb, 65536) == bytes(65536)
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()


# Python brings the first from 3.14 on; the extra "test" installs the second.
ZSTD_MODULES = [*(["compression.zstd"] if sys.version_info >= (3, 14) else []), "zstandard"]


@pytest.fixture(params=ZSTD_MODULES)
def zstd(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """One of the two modules, and the other one out of sight."""
    module: types.ModuleType = importlib.import_module(request.param)

    def only(name: str) -> types.ModuleType:
        if name != request.param:
            raise ModuleNotFoundError(name)
        return module

    monkeypatch.setattr("importlib.import_module", only)
    return module


def test_zstd(zstd: types.ModuleType) -> None:
    inflate = inflater(ZSTD)
    packed = zstd.compress(CLUSTER)
    assert inflate(packed, len(CLUSTER)) == CLUSTER
    assert inflate(memoryview(packed + b"\xff" * 511), len(CLUSTER)) == CLUSTER
    assert inflate(zstd.compress(bytes(64 << 20)), 65536) == bytes(65536)
    for data in (b"", packed[:-9], zstd.compress(CLUSTER[:-1]), b"\xff" * 512):
        with pytest.raises(Fault, match="has a compressed cluster that"):
            inflate(data, 65536)
