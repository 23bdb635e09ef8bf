"""Decompression of qcow2 clusters, in bounded memory.

Owns the choice of decompressors and their limits. Must not know where the bytes come from. Deflate is always available;
zstd is if it is part of Python (3.14) or the module zstandard is installed.
"""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable
from typing import Any

from qedfs.source.qcow2.format import DEFLATE
from qedfs.source.tables.faults import Fault

# The window size that every zstd decoder should support (RFC 8878, section 3.1.1.1.2). A cluster has at most 2 MiB.
_ZSTD_WINDOW_LOG = 23

Bytes = bytes | bytearray | memoryview
# (compressed bytes and whatever follows them, cluster size) -> the bytes of the cluster. Raises Fault.
Inflate = Callable[[Bytes, int], bytes]


def inflater(compression: int) -> Inflate:
    """The decompressor for a compression type. It may be called from any thread.

    Raises:
        Fault: no decompressor for it is installed.
    """
    if compression == DEFLATE:
        return _inflate
    for name, make in (("compression.zstd", _stdlib_zstd), ("zstandard", _zstandard)):
        try:
            return make(importlib.import_module(name))
        except ImportError:
            continue
    raise Fault("is compressed with zstd; install the Python module zstandard to read it")


def _inflate(data: Bytes, size: int) -> bytes:
    try:
        # QEMU compresses with a window of 4 KiB, but with the largest one we can read the output of every writer.
        plain = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size)
    except zlib.error as exc:
        raise Fault("has a compressed cluster that is damaged") from exc
    return _whole(plain, size)


def _stdlib_zstd(zstd: Any) -> Inflate:  # noqa: ANN401 - an optional module
    options = {zstd.DecompressionParameter.window_log_max: _ZSTD_WINDOW_LOG}

    def inflate(data: Bytes, size: int) -> bytes:
        try:
            plain = zstd.ZstdDecompressor(options=options).decompress(data, max_length=size)
        except zstd.ZstdError as exc:
            raise Fault("has a compressed cluster that is damaged") from exc
        return _whole(plain, size)

    return inflate


def _zstandard(zstandard: Any) -> Inflate:  # noqa: ANN401 - an optional module
    def inflate(data: Bytes, size: int) -> bytes:
        decompressor = zstandard.ZstdDecompressor(max_window_size=1 << _ZSTD_WINDOW_LOG)
        try:
            with decompressor.stream_reader(data) as reader:
                plain = reader.read(size)
        except zstandard.ZstdError as exc:
            raise Fault("has a compressed cluster that is damaged") from exc
        return _whole(plain, size)

    return inflate


def _whole(plain: bytes, size: int) -> bytes:
    if len(plain) != size:
        raise Fault(f"has a compressed cluster that holds {len(plain)} bytes instead of {size}")
    return plain
