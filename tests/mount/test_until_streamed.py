"""`--until-streamed` when an overlay can never become complete: it ends all the same, and says so."""

from __future__ import annotations

from pathlib import Path

from tests.harness.mounts import qedfs
from tests.mount.support import create, origin


def test_a_failed_stream_ends_it_with_the_exit_code_of_the_failure(tmp_path: Path) -> None:
    overlays = tmp_path / "overlays"
    overlays.mkdir()
    (tmp_path / "mnt").mkdir()
    with origin(tmp_path) as source:
        create(overlays / "good.qed", source.url)
        create(overlays / "gone.qed", f"{source.server.url}/none", "--size", "1M")
        done = qedfs("mount", overlays, tmp_path / "mnt", "--until-streamed", check=False)
    assert done.returncode == 4
    assert "404" in done.stderr.splitlines()[-1]
    assert '"backing": null' in qedfs("info", overlays / "good.qed", "--json").stdout


def test_a_broken_overlay_ends_it_with_the_exit_code_of_a_bad_overlay(tmp_path: Path) -> None:
    overlays = tmp_path / "overlays"
    overlays.mkdir()
    (tmp_path / "mnt").mkdir()
    (overlays / "text.qed").write_text("no overlay")
    with origin(tmp_path) as source:
        create(overlays / "good.qed", source.url)
        done = qedfs("mount", overlays, tmp_path / "mnt", "--until-streamed", check=False)
    assert done.returncode == 3
    assert "text.qed" in done.stderr.splitlines()[-1]
