"""Notices that the source of an image is away, long before its readers or its stream get an error.

Owns the text about it, and the trouble SOURCE_AWAY. Must not know who reads it. `circuit_breaker.py` measures.
"""

from __future__ import annotations

import time

from qedfs.errors import SourceUnreachable
from qedfs.image.condition import Cause
from qedfs.image.image import Image


def look_at_source(image: Image) -> None:
    """Note or clear the trouble. Call it about once a second."""
    source = image.source
    if source is None or image.complete:
        image.condition.clear(Cause.SOURCE_AWAY)
        return
    silence = source.silence()
    if not source.is_away:
        image.condition.clear(Cause.SOURCE_AWAY)
        return
    location = str(source.location)
    why = "" if source.error is None else str(source.error).removeprefix("backing ").removeprefix(location).strip(": ")
    at = time.strftime("%H:%M:%S", time.localtime(silence.since))
    text = f"source away since {at}: no answer from {location}" + (f": {why}" if why else "")
    image.condition.note(Cause.SOURCE_AWAY, SourceUnreachable(text), since=silence.since)
