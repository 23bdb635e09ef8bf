"""README's commands to install without a package are those that contrib/test-install types in an empty Debian."""

from __future__ import annotations

import re

from .machine import CONTRIB, ROOT


def test_what_is_tried_is_what_readme_says() -> None:
    script = (CONTRIB / "test-install").read_text()
    typed = [first or second for first, second in re.findall(r"""typed (?:"([^"]+)"|'([^']+)')""", script)]
    assert len(typed) == len(re.findall(r"\btyped ['\"]", script))
    blocks = re.findall(r"^```\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    said = {re.sub(r"\s+#.*", "", line) for block in blocks for line in block.splitlines()}
    assert [line for line in typed if "pip" in line and "uninstall" not in line and line not in said] == []
    assert "sudo ln -s /opt/qedfs-venv/bin/qedfs /usr/local/bin/qedfs" in said
