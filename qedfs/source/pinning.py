"""What the mounting user says about versions: which of the things that a source tells of its version count.

Pure. Owns `--pin` and `--identity`. Must not know how a version is found out or compared.
"""

from __future__ import annotations

import dataclasses
import enum

from qedfs.source.base import Identity


class By(enum.StrEnum):
    """What two looks at a source must have in common to be of one version."""

    ALL = "all"  # whatever the source tells
    ETAG = "etag"  # the tag alone, for dates that differ from server to server
    DATE = "date"  # the date alone, for tags that do
    SIZE = "size"  # the length, and the sampled bytes
    NONE = "none"  # the length while it is mounted, and nothing across mounts


@dataclasses.dataclass(frozen=True, slots=True)
class Pinning:
    """The user's rule. `called` is a name of their own for the version, or None."""

    by: By = By.ALL
    called: str | None = None

    def counted(self, told: Identity) -> Identity:
        """What of a version counts."""
        match self.by:
            case By.ALL:
                return told
            case By.ETAG:
                return dataclasses.replace(told, last_modified=None)
            case By.DATE:
                return dataclasses.replace(told, etag=None)
            case _:
                return dataclasses.replace(told, etag=None, last_modified=None, digest=None)


USUAL = Pinning()
