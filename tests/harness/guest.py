"""A Linux guest on an emulated CPU that checks a disk as a real machine would: through its own block layer and ext4.

The guest is a kernel and an initramfs of our own (busybox, the modules that reach a virtio disk, one script). It mounts
/dev/vda, verifies /mnt/SUMS with sha256sum, writes /mnt/written-by-guest, unmounts and powers off. Each step prints a
marker, so the console's text tells how far it came.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import lzma
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import zstandard

from .hang import HANG_SECONDS
from .images import ext4_image
from .require import GUEST_FOLDER, require, require_guest

# What the guest writes, and where in its file system.
WRITTEN_NAME = "written-by-guest"
WRITTEN = b"qedfs guest was here\n" * 4096

SUMS_NAME = "SUMS"

UP, MOUNTED, VERIFIED, WROTE, DONE = (f"GUEST-{step}" for step in ("UP", "MOUNTED", "VERIFIED", "WROTE", "DONE"))
FAILED = "GUEST-FAILED"
_TRIM = "qedfs.trim"  # on the kernel's command line: trim the file system first

# no_timer_check: on a busy machine the emulated timer may tick too late for the kernel's check, which then panics.
_KERNEL_OPTIONS = "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable no_timer_check random.trust_cpu=on"

# Modules the guest needs unless its kernel has them built in; what they depend on is found from their own words.
_MODULES = ("virtio_pci", "virtio_blk", "crc32c_generic", "ext4")

_INIT = f"""#!/bin/busybox sh
fail() {{ echo "{FAILED}: $1"; busybox poweroff -f; }}
busybox mount -t proc proc /proc
busybox mount -t devtmpfs dev /dev
echo {UP}
for module in $(busybox cat /modules/order); do busybox insmod /modules/$module || fail "insmod $module"; done
tries=0
while [ ! -b /dev/vda ]; do
    tries=$((tries + 1)); [ $tries -lt 100 ] || fail "no /dev/vda"
    busybox sleep 0.1
done
busybox mount -t ext4 /dev/vda /mnt || fail "mount"
echo {MOUNTED}
if busybox grep -q {_TRIM} /proc/cmdline; then busybox fstrim /mnt || fail "fstrim"; fi
cd /mnt
busybox sha256sum -c -s {SUMS_NAME} || fail "checksums"
echo {VERIFIED}
busybox cp /written {WRITTEN_NAME} || fail "write"
busybox sync
cd /
busybox umount /mnt || fail "umount"
echo {WROTE}
echo {DONE}
busybox poweroff -f
"""


def boot(drive: str, *, timeout_seconds: float = HANG_SECONDS, memory_mib: int = 256, trim: bool = False) -> str:
    """Boots the guest with its disk and returns the console's text.

    `drive` is the value of QEMU's -drive without interface and id: `file=/mnt/disk.raw,format=raw`. A file system made
    by `guest_disk` passes. `trim`: let the guest discard the free space before it reads a file.

    Raises:
        RuntimeError: the guest did not come to its end, or a step of it failed; the message holds the console's text.
    """
    argv: list[str] = [
        *(require_guest(), "-accel", "tcg,thread=multi", "-cpu", "max", "-m", str(memory_mib), "-smp", "1"),
        *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"),
        *("-kernel", str(GUEST_FOLDER / "vmlinuz"), "-initrd", str(initramfs())),
        *("-append", f"{_KERNEL_OPTIONS} {_TRIM * trim}"),
        *("-drive", f"if=virtio,{drive}"),
    ]
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_seconds, check=False)
    except subprocess.TimeoutExpired as exc:
        console = (exc.stdout or b"").decode(errors="replace")
        raise RuntimeError(f"the guest was not done after {timeout_seconds} s:\n{console}") from exc
    console = done.stdout.decode(errors="replace").replace("\r", "")
    if DONE not in console.splitlines():
        raise RuntimeError(f"the guest failed (QEMU's exit code {done.returncode}):\n{console}{done.stderr.decode()}")
    return console


def guest_disk(image: Path, size: int, folder: Path) -> Path:
    """Makes the disk that `boot` expects: an ext4 image with the files of `folder`, to which it adds SUMS."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS_NAME)
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder)}\n" for path in files]
    (folder / SUMS_NAME).write_text("".join(lines))
    return ext4_image(image, size, folder)


def read_back(image: Path, name: str = WRITTEN_NAME) -> bytes:
    """Reads a file out of an ext4 image without mounting it."""
    argv = [require("debugfs"), "-R", f"cat /{name}", str(image)]
    return subprocess.run(argv, check=True, capture_output=True).stdout


def free_bytes(image: Path) -> int:
    """How much of an ext4 image is free, according to its superblock."""
    argv = [require("dumpe2fs"), "-h", str(image)]
    text = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    numbers = dict(re.findall(r"^(Free blocks|Block size): +(\d+)", text, re.MULTILINE))
    return int(numbers["Free blocks"]) * int(numbers["Block size"])


@functools.cache
def initramfs(init: str = _INIT, files: tuple[tuple[str, bytes], ...] = (("written", WRITTEN),)) -> Path:
    """The guest's initramfs, beside its kernel; made once for each content.

    `init`: the script that the guest runs; /modules/order names what it inserts. `files`: programs or data in /.
    """
    require_guest()
    modules = dict(_modules_in_order())
    entries: list[tuple[str, int, bytes]] = [(name, 0o040755, b"") for name in ("dev", "proc", "mnt", "bin", "modules")]
    entries += [
        ("bin/busybox", 0o100755, Path(require("busybox")).read_bytes()),
        ("init", 0o100755, init.encode()),
        ("modules/order", 0o100644, " ".join(modules).encode()),
    ]
    entries += [(f"modules/{name}", 0o100644, code) for name, code in modules.items()]
    entries += [(name, 0o100755, data) for name, data in files]
    archive = _cpio(entries)
    path = GUEST_FOLDER / f"initramfs-{hashlib.sha256(archive).hexdigest()[:16]}.gz"
    if not path.exists():
        # Renamed when whole: two test runs may share the folder.
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_bytes(gzip.compress(archive, compresslevel=1, mtime=0))
        partial.rename(path)
    return path


def _modules_in_order() -> Iterator[tuple[str, bytes]]:
    """Name and code of each module to insert, those first on which others depend."""
    (folder,) = (GUEST_FOLDER / "modules").iterdir()
    built_in = {_module_name(line) for line in (folder / "modules.builtin").read_text().splitlines()}
    files = {_module_name(str(path)): path for path in folder.rglob("*.ko*")}
    seen: set[str] = set()

    def visit(name: str) -> Iterator[tuple[str, bytes]]:
        if name in seen or name in built_in:
            return
        seen.add(name)
        code = _module_code(files[name])
        for needed in _depends(code):
            yield from visit(needed)
        yield name, code

    for name in _MODULES:
        yield from visit(name)


def _module_name(path: str) -> str:
    # The kernel takes - and _ for the same.
    return path.rsplit("/", 1)[-1].split(".", 1)[0].replace("-", "_")


def _module_code(path: Path) -> bytes:
    # Debian 13 and Ubuntu compress their modules; busybox's insmod is not always built to read that.
    code = path.read_bytes()
    if path.suffix == ".zst":
        return zstandard.ZstdDecompressor().decompressobj().decompress(code)
    return lzma.decompress(code) if path.suffix == ".xz" else code


def _depends(code: bytes) -> list[str]:
    # The "depends=a,b" of the module's .modinfo section: an unpacked kernel package has no modules.dep yet.
    found = re.search(rb"\0depends=([^\0]*)\0", code)
    return [name for name in (found[1].decode() if found else "").replace("-", "_").split(",") if name]


def _cpio(entries: list[tuple[str, int, bytes]]) -> bytes:
    """An archive in the "newc" form (kernel: Documentation/driver-api/early-userspace/buffer-format.rst)."""
    out = bytearray()
    for number, (name, mode, data) in enumerate([*entries, ("TRAILER!!!", 0, b"")], start=1):
        encoded = name.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
        out += b"070701" + "".join(f"{field:08X}" for field in fields).encode() + encoded
        out += bytes(-len(out) % 4) + data
        out += bytes(-len(out) % 4)
    return bytes(out)
