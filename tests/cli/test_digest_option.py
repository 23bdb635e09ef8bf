"""`--verify`: how a digest is spelled, and what a wrong one says."""

from __future__ import annotations

import hashlib

import pytest

from qedfs.cli.digest_option import ALGORITHMS, ExpectedDigest
from qedfs.errors import QedfsError, UsageError


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_bytes_in_their_order_decide(algorithm: str) -> None:
    digits = hashlib.new(algorithm, b"ab").hexdigest()
    for spelling in (f"{algorithm}:{digits}", f"{algorithm.upper()}:{digits.upper()}"):
        expected = ExpectedDigest(spelling)
        expected.add(b"a")
        expected.add(memoryview(b"b"))
        expected.check("disk.raw")
    expected = ExpectedDigest(f"{algorithm}:{digits}")
    expected.add(b"ba")
    with pytest.raises(QedfsError, match=f"disk.raw: its {algorithm} is .*, not {digits}"):
        expected.check("disk.raw")


def test_digits_alone_are_sha256() -> None:
    expected = ExpectedDigest(hashlib.sha256(b"").hexdigest())
    expected.check("disk.raw")


@pytest.mark.parametrize("text", ["", "sha256:", "sha256:ab", "sha3:" + "a" * 64, "z" * 64, ":" + "a" * 64])
def test_what_is_no_digest(text: str) -> None:
    with pytest.raises(UsageError, match="--verify"):
        ExpectedDigest(text)
