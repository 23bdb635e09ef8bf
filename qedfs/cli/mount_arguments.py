"""What `qedfs mount` was asked for: the values of its parameters, before anything is made of them."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class MountArguments:
    """The parameters of `mount` under click's names, with absolute paths.

    Without --daemon and --ready-fd, which concern only the process that they are given to.
    """

    source: str
    mountpoint: str
    read_only: bool
    stream: str  # eager, idle or off
    copy_on_read: bool | None
    standby: bool
    standby_writes: str  # refuse, hold or activate
    stream_between: str | None
    stream_delay: str | None
    limit: int
    limit_total: int
    profile: str | None
    until_streamed: bool
    allow_backing: tuple[str, ...]
    credentials: str | None
    allow_other: bool
    metrics: str | None
    source_timeout: float
    on_source_error: str | None
    pin: str
    identity: str | None
    log_json: bool
    verbose: bool
