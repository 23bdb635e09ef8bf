"""Digests of the whole file, as servers spell them. The examples are of the empty file and of `hello world`."""

from __future__ import annotations

import base64
import hashlib

import pytest

from qedfs.source.http.answer import Answer
from qedfs.source.http.digests import published_digest

BODY = b"hello world"
HEX = {name: hashlib.new(name, BODY).hexdigest() for name in ("sha256", "sha512", "sha1", "md5")}
BASE64 = {name: base64.b64encode(bytes.fromhex(text)).decode() for name, text in HEX.items()}
SHA256 = f"sha-256:{HEX['sha256']}"


def answer(**fields: str | list[str]) -> Answer:
    named = {name.replace("_", "-"): value for name, value in fields.items()}
    return Answer(206, {name: [value] if isinstance(value, str) else value for name, value in named.items()})


@pytest.mark.parametrize(
    ("given", "digest"),
    [
        (answer(repr_digest=f"sha-256=:{BASE64['sha256']}:"), SHA256),
        (answer(repr_digest=f"sha-512=:{BASE64['sha512']}:, sha-256=:{BASE64['sha256']}:"), SHA256),
        (answer(repr_digest=f"sha-512=:{BASE64['sha512']}:"), f"sha-512:{HEX['sha512'][:64]}"),
        (answer(digest=f"SHA-256={BASE64['sha256']}"), SHA256),
        (answer(digest=f"md5={BASE64['md5']},SHA={BASE64['sha1']}"), f"sha-1:{HEX['sha1']}"),
        (answer(digest=f"unixsum=30637, sha-256={BASE64['sha256']}"), SHA256),
        (answer(x_checksum_sha256=HEX["sha256"]), SHA256),
        (answer(x_checksum_sha1=HEX["sha1"].upper(), x_checksum_md5=HEX["md5"]), f"sha-1:{HEX['sha1']}"),
        (answer(x_amz_checksum_sha256=BASE64["sha256"]), SHA256),
        (answer(x_amz_checksum_crc64nvme="jSnVw/bqjr4="), "crc64nvme:8d29d5c3f6ea8ebe"),
        (answer(x_goog_hash=f"crc32c=yZRlqg==,md5={BASE64['md5']}"), f"md5:{HEX['md5']}"),
        (answer(x_goog_hash=["crc32c=yZRlqg==", f"md5={BASE64['md5']}"]), f"md5:{HEX['md5']}"),
        (answer(x_goog_hash="crc32c=yZRlqg=="), "crc32c:c99465aa"),
        (answer(x_ms_blob_content_md5=BASE64["md5"]), f"md5:{HEX['md5']}"),
        (answer(docker_content_digest=f"sha256:{HEX['sha256']}"), SHA256),
        (answer(oc_checksum=f"SHA1:{HEX['sha1']}"), f"sha-1:{HEX['sha1']}"),
        (answer(x_oss_hash_crc64ecma="5981764153023615706"), f"crc64ecma:{5981764153023615706:016x}"),
        # The same one, told twice and in two spellings.
        (answer(digest=f"SHA-256={BASE64['sha256']}", x_checksum_sha256=HEX["sha256"]), SHA256),
    ],
)
def test_it_is_found(given: Answer, digest: str) -> None:
    assert published_digest(given) == digest


@pytest.mark.parametrize(
    "given",
    [
        answer(),
        # Of the part that was sent.
        answer(content_digest=f"sha-256=:{BASE64['sha256']}:", content_md5=BASE64["md5"]),
        # The digest of the digests of a multipart upload.
        answer(x_amz_checksum_sha256=f"{BASE64['sha256']}-5"),
        answer(digest="sha-256=not/base64!", repr_digest="sha-256", x_checksum_sha256=HEX["md5"]),
        answer(digest=f"sha-256={BASE64['md5']}", docker_content_digest="latest", oc_checksum=""),
        answer(digest=f"whirlpool={BASE64['md5']}", x_goog_hash="=,=,,"),
        answer(x_cos_hash_crc64ecma="9" * 20),
        answer(digest=f"sha-256={BASE64['sha256']}é"),
        # It contradicts itself.
        answer(x_checksum_sha256=[HEX["sha256"], "0" * 64]),
    ],
)
def test_it_is_not(given: Answer) -> None:
    assert published_digest(given) is None


def test_one_that_contradicts_itself_leaves_the_next_best() -> None:
    given = answer(x_checksum_sha256=[HEX["sha256"], "0" * 64], x_checksum_md5=HEX["md5"])
    assert published_digest(given) == f"md5:{HEX['md5']}"
