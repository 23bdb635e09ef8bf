"""The commands of README and the guide to install without a package are those that contrib/test-install types."""

from __future__ import annotations

import re

from tests.documents.blocks import commands_tried_by

from .machine import CONTRIB


def test_what_is_tried_is_what_the_documents_say() -> None:
    script = (CONTRIB / "test-install").read_text()
    typed = [first or second for first, second in re.findall(r"""typed (?:"([^"]+)"|'([^']+)')""", script)]
    assert len(typed) == len(re.findall(r"\btyped ['\"]", script))
    blocks = commands_tried_by("contrib/test-install")
    said = {re.sub(r"\s+#.*", "", line) for block in blocks for line in block.splitlines()}
    assert [line for line in typed if "pip" in line and "uninstall" not in line and line not in said] == []
    assert said - set(typed) == set()
