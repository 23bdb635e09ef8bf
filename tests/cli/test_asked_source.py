"""A backing that is asked without a mount: the answer, an error as it is, and a policy."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from qedfs.cli.asked_source import Asking, ask
from qedfs.errors import Refused, SourceError, SourceUnreachable
from qedfs.source.retrying import RetryingSource
from qedfs.source.url import parse_location


async def size_of(remote: RetryingSource, _: trio.Nursery) -> int:
    return (await remote.connect()).size


async def test_answer_refusal_and_error(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(1024))
    location = parse_location(str(tmp_path / "disk"))
    allowed = Asking((str(tmp_path),))
    assert await ask(location, allowed, size_of, raw=True) == 1024
    with pytest.raises(Refused, match="--allow-backing"):
        await ask(location, Asking(), size_of, raw=True)
    with pytest.raises((SourceError, SourceUnreachable)):
        await ask(parse_location(str(tmp_path / "none")), allowed, size_of, raw=True)
