"""The backing as the user types it on the command line, with advice for the usual mistakes.

Owns the guesses at what was meant. Must not contact a server. Nothing is guessed silently: each guess becomes an error
that says what to type.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from qedfs.errors import UsageError
from qedfs.source.url import Location, parse_location, redact

_URL = re.compile(r"(?:https?|nbds?|nbds?\+unix|ftp|file|s3|gs)://", re.IGNORECASE)
_NO_COLON = re.compile(r"(https?|nbds?)/+(.+)", re.IGNORECASE)


def misplaced_url(words: Sequence[str]) -> str | None:
    """The first of these arguments that is a URL; none of them should be."""
    return next((word for word in words if _URL.match(word)), None)


def location_of(text: str, folder: str, *, option: str = "--backing") -> Location:
    """The location of a backing. `folder`: that of the overlay, to which a path is relative. `option`: for messages.

    Raises:
        UsageError: it is neither a URL nor a path, or it is the path of a file that does not exist and looks like a URL
            without its scheme, or the file exists in the current folder only.
    """
    location = parse_location(text, relative_to=folder)
    # Not an absolute path: nothing else can be meant, and to look for it may take for ever (a dead file server). The
    # source that opens it has a deadline.
    if location.kind == "file" and location.path is not None and not os.path.isabs(text):
        advice = None if os.path.lexists(location.path) else _advice(text)
        if advice is not None:
            # The path is not shown: it may be a URL with a password.
            raise UsageError(f"{option}: there is no such file; {advice}")
    return location


def _advice(text: str) -> str | None:
    """What the user may have meant with the path of a file that does not exist, which is relative."""
    if os.path.lexists(text):
        return f"a path is relative to the overlay's folder; give it as {redact(os.path.abspath(text))}"
    url = _NO_COLON.fullmatch(text)
    if url is not None:
        return f"a URL is written like {redact(f'{url[1].lower()}://{url[2]}')}"
    first, slash, _ = text.partition("/")
    if slash and first not in (".", "..") and (first == "localhost" or set(first) & set(".:")):
        return f"a URL begins with its scheme, like {redact(f'http://{text}')}"
    return None
