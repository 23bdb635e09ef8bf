"""User name and password from ~/.netrc, for the URL that the user named.

Owns the choice of entry. Must not know redirects: the target of a redirect gets no login from here. That is why libcurl
does not read the file. It would look up every redirect target, too, and would send the password of a `default` entry to
any server that an overlay names.
"""

from __future__ import annotations

import dataclasses
import netrc
import os

from qedfs.errors import SourceError
from qedfs.source.hostname import ascii_host
from qedfs.source.http.target import Target
from qedfs.source.path import in_thread

NETRC = "~/.netrc"


async def with_login(target: Target) -> Target:
    """The target, with user name and password from ~/.netrc unless its URL has them.

    As with curl, an entry counts for all ports and for both http and https. Unlike with curl, `default` does not count,
    and the last of several entries for one host wins.

    Raises:
        SourceError: the file cannot be parsed.
    """
    if target.password is not None:
        return target
    found = await in_thread(NETRC, lambda: _entry(target))
    if found is None:
        return target
    user, password = found
    if target.user is None:
        return dataclasses.replace(target, user=user, password=password)
    return dataclasses.replace(target, password=password) if target.user == user else target


def _entry(target: Target) -> tuple[str, str] | None:
    try:
        hosts = netrc.netrc(os.path.expanduser(NETRC)).hosts
    except OSError:
        return None
    except netrc.NetrcParseError as exc:
        # The original message may quote a password.
        raise SourceError(f"backing {target.location}: line {exc.lineno} of ~/.netrc is not understood") from None
    except UnicodeDecodeError:
        raise SourceError(f"backing {target.location}: ~/.netrc is not text in UTF-8") from None
    for name, (user, _account, password) in hosts.items():
        # The parser stores the `default` entry under that name.
        if name != "default" and _same_host(name, target):
            return user or "", password or ""
    return None


def _same_host(name: str, target: Target) -> bool:
    try:
        return ascii_host(name.lower()) == target.location.host
    except ValueError:
        return False
