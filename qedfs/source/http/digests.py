"""The digest of the whole file that a server publishes in its header fields, in the many spellings of that.

Pure. Owns which fields speak of the whole file and not of the part that was sent: an answer to a range request may have
both. (`Content-Digest`, RFC 9530, and `Content-MD5` are of the part, so they are not looked at.) Must not know what a
digest is good for. The bytes are never checked against it; it tells versions apart.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator

from qedfs.source.http.answer import Answer

_MOST_DIGITS = 64  # hex digits that are kept: 256 bits
# Bytes of each algorithm's digest; the first one in this order that is told counts.
_SIZES = {"sha-256": 32, "sha-512": 64, "sha-1": 20, "md5": 16, "crc64nvme": 8, "crc64ecma": 8, "crc32c": 4}
_ALIASES = {"sha256": "sha-256", "sha512": "sha-512", "sha1": "sha-1", "sha": "sha-1"}
# One value, of the algorithm in the name.
_SOLE = {
    "x-checksum-sha256": "sha-256",  # Artifactory, Nexus, Maven repositories
    "x-checksum-sha1": "sha-1",
    "x-checksum-md5": "md5",
    "x-amz-checksum-sha256": "sha-256",  # S3; the digest of digests of a multipart upload does not have this form
    "x-amz-checksum-sha1": "sha-1",
    "x-amz-checksum-crc64nvme": "crc64nvme",
    "x-ms-blob-content-md5": "md5",  # Azure
    "x-cos-hash-crc64ecma": "crc64ecma",  # Tencent; a decimal number, as the next one
    "x-oss-hash-crc64ecma": "crc64ecma",  # Alibaba
}
_PREFIXED = ("docker-content-digest", "oc-checksum")  # registries: sha256:HEX; ownCloud and others: SHA1:HEX
# RFC 9530, RFC 3230 (of the whole "instance", for a range too), Google Cloud Storage.
_LISTS = ("repr-digest", "digest", "x-goog-hash")
_FIELDS = frozenset((*_SOLE, *_PREFIXED, *_LISTS))
_HEX = re.compile(r"(?:[0-9a-fA-F]{2})+", re.ASCII)
_DECIMAL = re.compile(r"[0-9]{1,20}", re.ASCII)


def published_digest(answer: Answer) -> str | None:
    """The best digest of the whole file that the answer tells, as `algorithm:hex`, or None."""
    if _FIELDS.isdisjoint(answer.fields):  # as in nearly all answers
        return None
    told: dict[str, set[str]] = {}
    for algorithm, text in _told(answer):
        name = _ALIASES.get(algorithm.lower(), algorithm.lower())
        value = _hex(name, text)
        if value is not None:
            told.setdefault(name, set()).add(value)
    # One that contradicts itself says nothing.
    return next((f"{name}:{min(told[name])[:_MOST_DIGITS]}" for name in _SIZES if len(told.get(name, ())) == 1), None)


def _told(answer: Answer) -> Iterator[tuple[str, str]]:
    """Algorithm and value of each digest."""
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
    """The digest in hex, if the text is one of this algorithm in hex or Base64, or the decimal CRC-64."""
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
