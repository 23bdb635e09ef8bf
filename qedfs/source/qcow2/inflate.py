"""Compressed clusters -> their bytes, in bounded memory.

Owns which decompressors there are and what they may cost. Must not know where the bytes come from. Deflate is always
there; zstd is if Python brings it (3.14) or the module zstandard is installed.
"""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable
from typing import Any

from qedfs.source.qcow2.format import DEFLATE, Fault

# What a decoder of zstd is asked to support (RFC 8878, section 3.1.1.1.2); a cluster has 2 MiB at the most.
_ZSTD_WINDOW_LOG = 23

Bytes = bytes | bytearray | memoryview
# (compressed bytes and what follows them, cluster size) -> as many bytes. Raises Fault.
Inflate = Callable[[Bytes, int], bytes]


def inflater(compression: int) -> Inflate:
    """The decompressor of a compression type. It may be called from any thread.

    Raises:
        Fault: this Python has none.
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
        # QEMU writes with a window of 4 KiB; a reader with the largest one understands every writer.
        plain = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size)
    except zlib.error as exc:
        raise Fault("has a compressed cluster that is damaged") from exc
    return _whole(plain, size)


def _stdlib_zstd(zstd: Any) -> Inflate:  # noqa: ANN401 - a module that is not everywhere
    options = {zstd.DecompressionParameter.window_log_max: _ZSTD_WINDOW_LOG}

    def inflate(data: Bytes, size: int) -> bytes:
        try:
            plain = zstd.ZstdDecompressor(options=options).decompress(data, max_length=size)
        except zstd.ZstdError as exc:
            raise Fault("has a compressed cluster that is damaged") from exc
        return _whole(plain, size)

    return inflate


def _zstandard(zstandard: Any) -> Inflate:  # noqa: ANN401 - a module that is not everywhere
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
