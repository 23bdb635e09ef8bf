"""User name and password for the place that the user named, out of ~/.netrc.

Owns which entries count. Must not know redirects: a place that a server sends us to gets nothing from here, and that
is why libcurl does not read the file. It would look each place up anew, and has the password of a `default` entry
for whatever server an overlay names.
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
    """The target with what ~/.netrc says about its host, as far as its URL leaves user name or password open.

    As for curl, an entry counts for all ports and for http as for https. `default` does not count, and of several
    entries for one host the last one does.

    Raises:
        SourceError: the file cannot be understood.
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
        # Its own text may quote a password.
        raise SourceError(f"backing {target.location}: line {exc.lineno} of ~/.netrc is not understood") from None
    except UnicodeDecodeError:
        raise SourceError(f"backing {target.location}: ~/.netrc is not text in UTF-8") from None
    for name, (user, _account, password) in hosts.items():
        # The parser files the `default` entry under that name.
        if name != "default" and _same_host(name, target):
            return user or "", password or ""
    return None


def _same_host(name: str, target: Target) -> bool:
    try:
        return ascii_host(name.lower()) == target.location.host
    except ValueError:
        return False
