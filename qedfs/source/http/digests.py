"""Finds the digest of the whole file in an answer's header fields, in the many formats that servers use.

Pure. Owns the knowledge of which fields are about the whole file rather than about the part that was sent. An answer to
a range request may have both. (`Content-Digest`, RFC 9530, and `Content-MD5` are about the part, and are ignored.) Must
not know what a digest is used for. It tells versions apart; the bytes are never verified against it.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator

from qedfs.source.http.answer import Answer

_MOST_DIGITS = 64  # longer digests are cut to this many hex digits, 256 bits
# Digest size of each algorithm in bytes. If an answer has several digests, the first in this order counts.
_SIZES = {"sha-256": 32, "sha-512": 64, "sha-1": 20, "md5": 16, "crc64nvme": 8, "crc64ecma": 8, "crc32c": 4}
_ALIASES = {"sha256": "sha-256", "sha512": "sha-512", "sha1": "sha-1", "sha": "sha-1"}
# Fields with one value, whose name implies the algorithm.
_SOLE = {
    "x-checksum-sha256": "sha-256",  # Artifactory, Nexus, Maven repositories
    "x-checksum-sha1": "sha-1",
    "x-checksum-md5": "md5",
    "x-amz-checksum-sha256": "sha-256",  # S3; the digest of digests of a multipart upload has another format
    "x-amz-checksum-sha1": "sha-1",
    "x-amz-checksum-crc64nvme": "crc64nvme",
    "x-ms-blob-content-md5": "md5",  # Azure
    "x-cos-hash-crc64ecma": "crc64ecma",  # Tencent; a decimal number, like the next one
    "x-oss-hash-crc64ecma": "crc64ecma",  # Alibaba
}
_PREFIXED = ("docker-content-digest", "oc-checksum")  # registries: sha256:HEX; ownCloud and others: SHA1:HEX
# RFC 9530, RFC 3230 (the digest of the whole "instance" even in an answer with a range), Google Cloud Storage.
_LISTS = ("repr-digest", "digest", "x-goog-hash")
_FIELDS = frozenset((*_SOLE, *_PREFIXED, *_LISTS))
_HEX = re.compile(r"(?:[0-9a-fA-F]{2})+", re.ASCII)
_DECIMAL = re.compile(r"[0-9]{1,20}", re.ASCII)


def published_digest(answer: Answer) -> str | None:
    """The best digest of the whole file in the answer, as `algorithm:hex`, or None."""
    if _FIELDS.isdisjoint(answer.fields):  # true of nearly all answers
        return None
    told: dict[str, set[str]] = {}
    for algorithm, text in _told(answer):
        name = _ALIASES.get(algorithm.lower(), algorithm.lower())
        value = _hex(name, text)
        if value is not None:
            told.setdefault(name, set()).add(value)
    # If an answer has different digests of one algorithm, neither counts.
    return next((f"{name}:{min(told[name])[:_MOST_DIGITS]}" for name in _SIZES if len(told.get(name, ())) == 1), None)


def _told(answer: Answer) -> Iterator[tuple[str, str]]:
    """The algorithm and value of each digest in the answer."""
    for name, algorithm in _SOLE.items():
        for value in answer.fields.get(name, ()):
            yield algorithm, value
    for name in _PREFIXED:
        for value in answer.fields.get(name, ()):
            algorithm, _, text = value.partition(":")
            yield algorithm, text
    for name in _LISTS:
        for value in answer.fields.get(name, ()):
            for member in value.split(","):
                algorithm, _, text = member.strip().partition("=")
                yield algorithm, text.strip().strip(":")


def _hex(algorithm: str, text: str) -> str | None:
    """The digest in hex; None unless the text is a digest of this algorithm in hex, Base64 or, for CRC-64, decimal."""
    size = _SIZES.get(algorithm)
    if algorithm == "crc64ecma" and _DECIMAL.fullmatch(text):
        return f"{int(text):016x}" if int(text) < 1 << 64 else None
    if size is None or len(text) > 2 * size:
        return None
    if len(text) == 2 * size and _HEX.fullmatch(text):
        return text.lower()
    try:
        decoded = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    return decoded.hex() if len(decoded) == size else None
