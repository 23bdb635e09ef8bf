"""Parser for the status line and the header fields of an HTTP/1.1 answer.

Pure. Owns the syntax of status lines and header fields. Must not know what a field means (`judge.py`).
libcurl has already split the header into lines. Whatever it lets through that RFC 9112 forbids is refused here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

from qedfs.errors import Reason, SourceUnreachable

_STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([1-9][0-9]{2})(?: [^\r\n\0]*)?\r?\n?")
_FIELD_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\r\n\0]*?)[ \t]*\r?\n?")


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """Status code and header fields. Field names are in lower case; a repeated field keeps all its values."""

    status: int
    fields: Mapping[str, Sequence[str]]

    def sole(self, name: str) -> str | None:
        """The value of a field that may occur only once, or None if it is absent.

        Raises:
            ValueError: it occurs with different values, and no rule says which of them counts.
        """
        values = self.fields.get(name)
        if not values:
            return None
        if len(values) > 1 and any(value != values[0] for value in values):
            raise ValueError(f"several different {name} fields")
        return values[0]


def parse_answer(lines: Sequence[bytes], where: str) -> Answer:
    """Parse a status line and the field lines after it (RFC 9112, sections 4 and 5), without the empty line.

    Values are decoded as Latin-1, which keeps every byte. Folded lines are refused (RFC 9112, section 5.2).
    `where` names the source in messages.

    Raises:
        SourceUnreachable: a line violates the RFC. The connection cannot be used any more.
    """
    status = _STATUS_LINE.fullmatch(lines[0]) if lines else None
    if status is None:
        raise SourceUnreachable(f"{where}: the answer does not begin with an HTTP status line", reason=Reason.ANSWER)
    fields: dict[str, list[str]] = {}
    for line in lines[1:]:
        field = _FIELD_LINE.fullmatch(line)
        if field is None:
            raise SourceUnreachable(f"{where}: the answer has a garbled header line", reason=Reason.ANSWER)
        fields.setdefault(field[1].decode("ascii").lower(), []).append(field[2].decode("latin-1"))
    return Answer(int(status[1]), fields)
