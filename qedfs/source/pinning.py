"""The user's pinning rule: which validators of a source count when its version is compared.

Pure. Owns the meaning of `--pin` and `--identity`. Must not know how a version is determined or compared.
"""

from __future__ import annotations

import dataclasses
import enum

from qedfs.source.base import Identity


class By(enum.StrEnum):
    """What must be equal for two identities to be the same version."""

    ALL = "all"  # everything that the source reports
    ETAG = "etag"  # the tag but not the date, which may differ between servers
    DATE = "date"  # the date but not the tag, which may differ between servers
    SIZE = "size"  # the length and the sampled bytes
    NONE = "none"  # the length while mounted, nothing across mounts


@dataclasses.dataclass(frozen=True, slots=True)
class Pinning:
    """The user's rule. `called` is the user's own name for the version, or None."""

    by: By = By.ALL
    called: str | None = None

    def counted(self, told: Identity) -> Identity:
        """The identity, reduced to what counts."""
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
