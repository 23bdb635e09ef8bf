"""Asks the backing of an overlay file something, for commands that work without a mount.

Owns the connection. Must not know what is asked. An overlay may name anything, so a policy says what is contacted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

import trio

from qedfs.errors import QedfsError
from qedfs.source.credentials import NO_CREDENTIALS, Credentials
from qedfs.source.pinning import USUAL, Pinning
from qedfs.source.url import Location

if TYPE_CHECKING:
    from qedfs.source.retrying import RetryingSource

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class Asking:
    """How a backing may be asked. `allow_backing`: as for a mount."""

    allow_backing: tuple[str, ...] = ()
    credentials: Credentials = NO_CREDENTIALS
    timeout_seconds: float = 10.0
    pinning: Pinning = USUAL


async def ask(
    location: Location,
    asking: Asking,
    question: Callable[[RetryingSource, trio.Nursery], Awaitable[T]],
    *,
    raw: bool,
) -> T:
    """Connect, put the question, and disconnect. `raw`: the format is known, and the content is not looked at.

    Raises:
        SourceUnreachable, SourceError: it gives no answer, or none that can be used.
        Refused: the policy does not allow it.
        QedfsError: whatever the question raises.
    """
    # Imported here because loading libcurl is slow.
    from qedfs.source.open import remote_source
    from qedfs.source.policy import Policy

    answer: list[T] = []
    failure: QedfsError | None = None
    async with trio.open_nursery() as nursery:
        remote = remote_source(
            location,
            Policy(asking.allow_backing),
            nursery,
            deadline_seconds=asking.timeout_seconds,
            raw=raw,
            credentials=asking.credentials,
            pinning=asking.pinning,
        )
        try:
            answer.append(await question(remote, nursery))
        except QedfsError as exc:
            failure = exc  # raised outside of the nursery, which would wrap it in a group
        finally:
            with trio.CancelScope(shield=True):
                await remote.aclose()
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return answer[0]
