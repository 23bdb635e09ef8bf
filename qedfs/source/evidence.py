"""Whether another source has the bytes of a version that was read before: compares sampled blocks.

Owns the question whether samples can be compared at all. Samples are of the file on the server (`samples.py`). So those
of a raw disk can be compared with any format, those of a qcow2 or QED file only with another copy of that file.
"""

from __future__ import annotations

import functools

from qedfs.source.base import HasFile
from qedfs.source.retrying import RetryingSource
from qedfs.source.samples import Samples


async def difference(other: RetryingSource, samples: Samples, *, of_raw: bool) -> str | None:
    """How the bytes of `other` differ from these samples, in words; "" if they do not; None if nothing can be compared.

    `of_raw`: the samples are of a raw disk. Raises what `RetryingSource.connect` raises.
    """
    if not samples:
        return None
    if not of_raw:
        await other.connect()
        return await other.difference(samples) or "" if isinstance(other.connected, HasFile) else None
    size = (await other.connect()).size
    return await samples.difference(functools.partial(other.read, urgent=True), size) or ""
