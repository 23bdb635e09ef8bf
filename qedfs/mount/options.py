"""The options of a mount that concern its images. Plain values."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from qedfs.image.boot_profile import Range
from qedfs.image.source_errors import OnSourceError
from qedfs.image.write_gate import Writes
from qedfs.jobs.rules import Rules
from qedfs.source.credentials import NO_CREDENTIALS, Credentials
from qedfs.source.pinning import USUAL, Pinning
from qedfs.source.policy import Policy
from qedfs.source.retrying import DEADLINE_SECONDS


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """The options of `qedfs mount` for its images."""

    stream: bool = True
    rules: Rules = dataclasses.field(default_factory=Rules)
    read_only: bool = False  # open the overlays read-only
    copy_on_read: bool | None = None  # None: as the overlay says
    standby: bool = False  # put empty overlays in standby; those that are in standby stay there without it
    standby_writes: Writes = Writes.REFUSE
    limit: int = 0  # bytes per second and image, 0 for none
    limit_total: int = 0  # bytes per second of all images together, 0 for none
    profile: tuple[Range, ...] = ()  # to populate first
    policy: Policy = dataclasses.field(default_factory=Policy)
    pinning: Pinning = USUAL
    credentials: Credentials = NO_CREDENTIALS
    deadline_seconds: float = DEADLINE_SECONDS
    on_source_error: OnSourceError | None = None  # None: as the overlay says
    journal_folder: Path | None = None
    session_prefix: str = ""  # of the ids of sessions, in hexadecimal
