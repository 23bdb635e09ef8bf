"""The digest that an image must have, as a user gives it to `--verify`: sha256:HEX.

Owns its spelling and the comparison. Must not know where the bytes come from.
"""

from __future__ import annotations

import hashlib
import re

from qedfs.errors import QedfsError, UsageError

ALGORITHMS = ("sha256", "sha512", "sha1", "md5")  # that publishers of disk images use
READ_BYTES = 1 << 20


class ExpectedDigest:
    """What bytes, given in their order, have to hash to."""

    def __init__(self, text: str) -> None:
        """`text`: such as sha256:9f86d0..., or the 64 digits alone. Raises UsageError."""
        name, colon, digits = text.lower().rpartition(":")
        self._algorithm = name if colon else "sha256"
        if self._algorithm not in ALGORITHMS:
            raise UsageError(f"--verify {text}: {self._algorithm} is not one of {', '.join(ALGORITHMS)}")
        self._hash = hashlib.new(self._algorithm, usedforsecurity=False)
        self._digits = digits
        if not re.fullmatch(f"[0-9a-f]{{{2 * self._hash.digest_size}}}", digits):
            raise UsageError(f"--verify {text}: {self._algorithm} has {2 * self._hash.digest_size} hexadecimal digits")

    def add(self, data: bytes | memoryview) -> None:
        """The next bytes."""
        self._hash.update(data)

    def check(self, name: str) -> None:
        """Raise QedfsError unless they are all as expected. `name`: whose digest it is."""
        found = self._hash.hexdigest()
        if found != self._digits:
            raise QedfsError(f"{name}: its {self._algorithm} is {found}, not {self._digits}")
