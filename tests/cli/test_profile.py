"""`qedfs profile` and `mount --profile` with a real mount and web server."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.harness.hang import HANG_OPTION
from tests.harness.images import random_image
from tests.harness.mounts import mounted, qedfs
from tests.harness.process import wait_for
from tests.harness.servers import nginx

MIB = 1 << 20
CLUSTER_SIZE = 65536
PLACES = [20 * MIB, 3 * MIB, 11 * MIB + 4096]


def test_a_second_mount_brings_in_what_readers_of_the_first_waited_for(tmp_path: Path) -> None:
    raw = random_image(tmp_path / "disk", 32 * MIB, seed=7)
    profile = tmp_path / "boot.profile"
    with nginx(tmp_path) as server:
        for name in ("first", "second"):
            qedfs("create", tmp_path / f"{name}.qed", "--backing", f"{server.url}/disk")
        with mounted(tmp_path / "first.qed", tmp_path / "mnt", "--no-stream") as mount:
            nothing = qedfs("profile", mount.mountpoint, "first", profile, check=False)
            assert nothing.returncode == 1
            assert (
                nothing.stderr
                == "qedfs: first.raw: no reader has waited for anything yet, so the profile would be empty\n"
            )
            _read(mount.path("first.raw"), raw)
            done = json.loads(qedfs("profile", mount.mountpoint, "first.raw", profile, "--json").stdout)
            assert done["file"] == str(profile)
            assert done["range_count"] >= len(PLACES)
            assert json.loads(qedfs("profile", mount.mountpoint, "first", profile, "--json").stdout) == done
            swapped = qedfs("profile", mount.mountpoint, "first", tmp_path / "second.qed", check=False)
            assert swapped.returncode == 2
            assert "second.qed: exists already and is not a profile; remove it or choose another name" in swapped.stderr
            assert mount.unmount() == 0
        with mounted(tmp_path / "second.qed", tmp_path / "mnt", "--no-stream", "--profile", profile) as mount:
            wait_for(lambda: mount.image()["populated"] >= len(PLACES) * CLUSTER_SIZE, "the clusters of the profile")
            for pos in PLACES:
                qedfs("wait", mount.mountpoint, "--for", f"populated:{pos}-{pos + 4096}", "--timeout", HANG_OPTION)
            counters = mount.image()["counters"]
            assert not counters["missed"]
            assert counters["kept_asked"] < 2 * MIB
            _read(mount.path("second.raw"), raw)
            assert mount.image()["counters"]["missed"] == 0


def _read(image: Path, raw: Path) -> None:
    with image.open("rb", buffering=0) as file, raw.open("rb") as origin:
        # The kernel's own read-ahead would bring in more than what is asked for.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for pos in PLACES:
            assert os.pread(file.fileno(), 4096, pos) == os.pread(origin.fileno(), 4096, pos)


@pytest.mark.parametrize(
    ("options", "content", "complaint"),
    [
        (
            ["--read-only"],
            "qedfs profile 1\n0 1\n",
            "--profile fetches clusters, and nothing would be kept; omit it",
        ),
        ([], "0 1\n", "PROFILE: is not a profile; qedfs profile makes one"),
        ([], None, "PROFILE: No such file or directory; qedfs profile creates profiles"),
    ],
    ids=["read-only", "no-profile", "missing"],
)
def test_a_profile_that_cannot_be_used_is_refused(
    tmp_path: Path, options: list[str], content: str | None, complaint: str
) -> None:
    profile = tmp_path / "p"
    if content is not None:
        profile.write_text(content)
    (tmp_path / "mnt").mkdir()
    qedfs("create", tmp_path / "a.qed", "--size", "1M")
    done = qedfs("mount", tmp_path / "a.qed", tmp_path / "mnt", "--profile", profile, *options, check=False)
    assert done.returncode == 2
    assert done.stderr == f"qedfs: {complaint.replace('PROFILE', str(profile))}\n"
