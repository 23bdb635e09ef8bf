"""The tables of an overlay cannot be written: that is told until they are, whatever else goes well meanwhile."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from tests.harness.images import qemu_check
from tests.harness.mounts import Mount, mounted
from tests.harness.process import Child, wait_for
from tests.harness.require import require, require_root
from tests.mount.support import CLUSTER_SIZE, MIB, create

SIZE = 4 * MIB


@contextlib.contextmanager
def failing_writes(mount: Mount, log: Path) -> Iterator[None]:
    """Whatever the process that serves the mount writes to an overlay fails with EIO, by strace, in the block."""
    calls = "pwritev,pwritev2"  # os.pwritev is either
    argv = [require("strace"), "-f", "-p", str(mount.pid), "-e", f"trace={calls}", "-e", f"inject={calls}:error=EIO"]
    tracer = Child(argv, log)
    try:
        tracer.wait_until(lambda: "attached" in tracer.output(), "strace attached")
        yield
    finally:
        tracer.stop()


def test_status_tells_of_a_failed_commit_after_a_good_read(tmp_path: Path) -> None:
    """What is kept of zeros is entries only, so that nothing is written before the commit."""
    require_root()
    backing = tmp_path / "backing.raw"
    backing.write_bytes(bytes(SIZE))
    overlay = create(tmp_path / "disk.qed", str(backing))
    with mounted(overlay, tmp_path / "mnt", "--no-stream", "--allow-backing", backing) as mount:
        with mount.path("disk.raw").open("rb", buffering=0) as image:
            image.read(512)
            began = time.time()
            with failing_writes(mount, tmp_path / "strace"):
                image.seek(MIB)
                image.read(512)
                wait_for(lambda: mount.image()["error"] is not None, "the failed commit")
                populated = mount.image()["populated"]
                image.seek(2 * MIB)
                image.read(512)
                wait_for(lambda: mount.image()["populated"] >= populated + CLUSTER_SIZE, "the adoption")
                found = mount.image()
                assert "cannot write" in found["error"]
                (trouble,) = found["condition"]
                assert (trouble["cause"], trouble["error"]) == ("commit-failed", found["error"])
                assert began <= trouble["since"] <= time.time()
                assert "commit" in trouble["ends_with"]
        wait_for(lambda: mount.image()["condition"] == [], "a commit that succeeds")
        assert mount.image()["error"] is None
        assert mount.unmount() == 0
    assert qemu_check(overlay) == (0, 0)
