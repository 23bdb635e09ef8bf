"""A fault of an image becomes an error that names the image."""

from __future__ import annotations

import pytest

from qedfs.errors import SourceChanged, SourceError
from qedfs.source.tables.faults import Fault, faults


def test_faults_are_named_and_other_errors_pass() -> None:
    with pytest.raises(SourceError, match=r"^backing disk\.img is odd$") as caught, faults("disk.img"):
        raise Fault("is odd")
    assert isinstance(caught.value.__cause__, Fault)
    with pytest.raises(SourceChanged, match=r"^new$"), faults("disk.img"):
        raise SourceChanged("new")
