"""Format probing: recognizes image formats, archives, compressed files and web pages by their first and last bytes.

Owns the magic numbers and the advice for each format. Pure; must not know who asks.

A disk begins with boot code, a partition table, a file system or zeros, none of which looks like these formats. File
systems, ISO images and LUKS headers are legitimate contents of a raw disk, so they are not listed here. Neither are
magic numbers of two bytes, which boot code may contain by chance. Text alone is no reason to refuse a file that could
be a disk, either: only text that begins as a page or an error message does, or that is too short and too odd in length.
"""

from __future__ import annotations

import dataclasses
import re

from qedfs.format.header import MAGIC as QED_MAGIC
from qedfs.source.qcow2.format import MAGIC as QCOW2_MAGIC

HEAD_BYTES = 512
TAIL_BYTES = 512  # the footers of VHD and UDIF

_CONVERT = "make a raw or qcow2 one with qemu-img convert"
_EXTRACT = "take the disk out of it"
_CHECK = "check what the server has there"
_PAGE = (
    "the server sends a page instead of the file: see in a browser whether it is a login (put user name and password"
    " into ~/.netrc) or a list of files (give the URL of one of them)"
)
_ANSWER = "the server seems to send a message instead of the file: see with curl what it says"

# A file of text with at least this size, or with whole sectors, could be a disk that somebody has put text on.
LARGEST_NOTE_BYTES = 64 << 10
_SECTOR_BYTES = 512


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """A format. `name`: for messages, after "looks like"; `way_out`: what the user can do about it.

    `at`: whether the "first" or the "last" bytes of the file show it.
    """

    name: str
    way_out: str
    at: str = "first"


QCOW2 = Found("qcow2", "")
QED = Found("qed", "")
RAW = Found("raw", "")
WEB_PAGE = Found("a web page", _PAGE)


def _unpack(name: str, command: str) -> Found:
    return Found(name, f"unpack it first ({command})")


# Formats by their first bytes. Sources: QEMU's probe for the image formats, libmagic for all of them.
_HEADS = {
    QED_MAGIC: QED,
    b"KDMV": Found("VMDK", _CONVERT),
    b"COWD": Found("VMDK", _CONVERT),
    b"# Disk DescriptorFile": Found("VMDK", f"it only describes a disk; {_CONVERT}"),
    b"vhdxfile": Found("VHDX", _CONVERT),
    b"conectix": Found("VHD", _CONVERT),
    b"WithoutFreeSpace": Found("Parallels", _CONVERT),
    b"WithouFreSpacExt": Found("Parallels", _CONVERT),
    b"Bochs Virtual HD Image": Found("Bochs", _CONVERT),
    b"#!/bin/sh\n#V2.0 Format\n": Found("cloop", _CONVERT),
    b"VMA\0": Found("Proxmox VMA", f"{_EXTRACT} with vma extract"),
    b"\x3a\xff\x26\xed": _unpack("Android sparse", "simg2img"),
    b"partclone-image": _unpack("partclone", "partclone.restore"),
    b"EVF\x09\x0d\x0a\xff\0": _unpack("EnCase (E01)", "ewfexport"),
    b"MSWIM\0\0\0": Found("WIM", _EXTRACT),
    b"\xfd7zXZ\0": _unpack("xz", "xz -d"),
    b"\x1f\x8b\x08": _unpack("gzip", "gunzip"),
    b"\x28\xb5\x2f\xfd": _unpack("zstd", "zstd -d"),
    b"\x04\x22\x4d\x18": _unpack("lz4", "lz4 -d"),
    b"\x02\x21\x4c\x18": _unpack("lz4", "lz4 -d"),
    b"LZIP\x01": _unpack("lzip", "lzip -d"),
    b"\x89LZO\0\x0d\x0a\x1a\x0a": _unpack("lzop", "lzop -d"),
    b"PK\x03\x04": _unpack("zip", "unzip"),
    b"PK\x05\x06": _unpack("zip", "unzip"),
    b"PK\x07\x08": _unpack("zip", "unzip"),
    b"7z\xbc\xaf\x27\x1c": _unpack("7z", "7z x"),
    b"Rar!\x1a\x07": _unpack("RAR", "unrar x"),
    b"MSCF\0\0\0\0": _unpack("cabinet", "cabextract"),
    b"xar!": Found("xar", _EXTRACT),
    b"!<arch>\n": Found("ar", _EXTRACT),
    b"\xed\xab\xee\xdb": Found("RPM", _EXTRACT),
    b"070701": Found("cpio", _EXTRACT),
    b"070702": Found("cpio", _EXTRACT),
    b"070707": Found("cpio", _EXTRACT),
    b"-----BEGIN PGP": Found("PGP", _CHECK),
    b"version https://git-lfs.github.com/": Found("a Git LFS pointer", _CHECK),
    b"d8:announce": Found("a BitTorrent file", "download with it, and use the local copy"),
}
_PATTERNS = {
    re.compile(rb"BZh[1-9](?:\x31\x41\x59\x26\x53\x59|\x17\x72\x45\x38\x50\x90)"): _unpack("bzip2", "bunzip2"),
    # A skippable frame, which a zstd (RFC 8878, section 3.1.2) or lz4 file may begin with.
    re.compile(rb"[\x50-\x5f]\x2a\x4d\x18", re.DOTALL): _unpack("zstd or lz4", "zstd -d"),
    # Properties, dictionary size (a multiple of 64 KiB), size (unknown or below 1 TiB), and data that begins with zero.
    re.compile(rb"\x5d\0\0..(?:\xff{8}|.{5}\0{3})\0", re.DOTALL): _unpack("lzma", "xz -d"),
    re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype\s+html|html)\b", re.IGNORECASE): WEB_PAGE,
    re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype|\?xml)\b", re.IGNORECASE): Found("XML", _ANSWER),
}
# These count only if all the bytes are text.
_TEXTS = {
    re.compile(r"<!--|<(?:head|body|title|meta|script|h1|p|center|pre)\b", re.IGNORECASE): WEB_PAGE,
    re.compile(r"<[a-z_][\w.:-]*[\s/>]", re.IGNORECASE): Found("XML", _ANSWER),
    re.compile(r"\{\s*(?:\"|\}\s*$)|\[\s*(?:[{\"\[]|\]\s*$)"): Found("JSON", _ANSWER),
}
_NOTE = Found("plain text", _ANSWER)
_NO_TEXT = re.compile(r"[\x00-\x08\x0e-\x1f\x7f\ufffd]")
_VDI = (64, b"\x7f\x10\xda\xbe")
_TAR = (257, b"ustar")


def probe(head: bytes, tail: bytes, *, size: int | None = None, media_type: str = "") -> Found:
    """The format of a file from its first HEAD_BYTES and last TAIL_BYTES, or from all of a shorter file.

    `size`: of the file, in bytes. `media_type`: what a web server calls it, "" if unknown. That alone decides nothing,
    since many servers call files of an unknown kind text/plain or text/html.
    """
    return _by_head(head) or _by_tail(tail) or _by_text(head, tail, size, media_type) or RAW


def _by_head(head: bytes) -> Found | None:
    if head.startswith(QCOW2_MAGIC):
        return Found("qcow (version 1)", _CONVERT) if head[4:8] == b"\0\0\0\1" else QCOW2
    for magic, found in _HEADS.items():
        if head.startswith(magic):
            return found
    if head.startswith(_VDI[1], _VDI[0]):
        return Found("VDI", _CONVERT)
    if head.startswith(_TAR[1], _TAR[0]):
        name = head[:100].partition(b"\0")[0]
        # In an OVA the descriptor comes first (DSP0243, section 5.3).
        return Found("OVA" if name.lower().endswith(b".ovf") else "tar", f"{_EXTRACT} with tar -x")
    return next((found for pattern, found in _PATTERNS.items() if pattern.match(head)), None)


def _by_tail(tail: bytes) -> Found | None:
    # A fixed VHD is a raw disk with a footer of 512 bytes, or of 511 if an old version of Virtual PC wrote it.
    if tail.startswith(b"conectix") or tail.startswith(b"conectix", 1):
        return Found("VHD", f"it has a footer after the disk; {_CONVERT} -f vpc -O raw", "last")
    if tail.startswith(b"koly"):
        return Found("DMG", _CONVERT, "last")
    return None


def _by_text(head: bytes, tail: bytes, size: int | None, media_type: str) -> Found | None:
    text = _as_text(head)
    if not text:
        return None
    for pattern, found in _TEXTS.items():
        if pattern.match(text.lstrip()):
            return found
    if media_type in ("text/html", "application/xhtml+xml"):
        return WEB_PAGE
    odd = size is not None and size < LARGEST_NOTE_BYTES and size % _SECTOR_BYTES != 0
    return _NOTE if odd and _as_text(tail) else None


def _as_text(data: bytes) -> str:
    """The bytes as text without a byte order mark; "" if they are no text."""
    # A character of several bytes may be cut at either end.
    text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", errors="replace").strip("\ufffd")
    return text if not _NO_TEXT.search(text) else ""
