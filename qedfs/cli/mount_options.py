"""`-o key=value,...` as mount(8) and fstab write it, and short forms -> the long options of `qedfs mount`.

Pure. Owns this spelling, and which options are ignored. Must not know what an option does. Every long option can be
written this way. `_` and `-` are the same, and `ro` means `read_only`. Common fstab options that are meant for other
programs are ignored, so that a mount helper can pass its options on unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from qedfs.errors import UsageError

_SPELLINGS = {"ro": "read-only"}
# Expanded here, because click 8.1 (Debian 13) mishandles two options for one parameter if one of them is a flag.
_SHORT_FORMS = {"--no-stream": "--stream=off"}
# mount(8), systemd.mount(5): options for other programs.
_IGNORED = re.compile(
    r"[xX]-.*|_netdev|nofail|(no)?auto|defaults|rw|async|(no)?(users?|owner|group)|(no)?dev|(no)?suid|(no)?exec"
    r"|(no|rel|norel|strict|nostrict)?atime|(no)?(lazytime|diratime|iversion)|silent|loud|comment=.*"
)


def expand(arguments: Sequence[str]) -> list[str]:
    """The arguments with each `-o` and each short form replaced by the long options that it stands for.

    Raises:
        UsageError: `remount` is among them.
    """
    expanded: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--":
            return [*map(_spelled_out, expanded), argument, *rest]
        if argument == "-o":
            expanded += _long_options(next(rest, ""))
        elif argument.startswith("-o") and not argument.startswith("--"):
            expanded += _long_options(argument[2:])
        else:
            expanded.append(argument)
    return [*map(_spelled_out, expanded)]


def _long_options(text: str) -> Iterator[str]:
    for option in filter(None, text.split(",")):
        name, equals, value = option.partition("=")
        if option == "remount":
            raise UsageError("-o remount: the options of a mount cannot be changed; unmount it and mount it again")
        if not _IGNORED.fullmatch(option):
            yield f"--{_SPELLINGS.get(name, name).replace('_', '-')}{equals}{value}"


def _spelled_out(argument: str) -> str:
    return _SHORT_FORMS.get(argument, argument)
