"""Root's sockets are found from a service and from a login session alike."""

from __future__ import annotations

from pathlib import Path

from tests.harness.mounts import mounted, qedfs
from tests.harness.require import require_root
from tests.mount.support import MIB, create, origin


def test_a_service_is_found_from_a_login_session(tmp_path: Path) -> None:
    require_root()
    session = tmp_path / "session"
    session.mkdir()
    with origin(tmp_path, MIB) as source:
        overlay = create(tmp_path / "disk.qed", source.url)
        with mounted(overlay, tmp_path / "mnt") as mount:
            qedfs("wait", mount.mountpoint, "--timeout", "30s", env={"XDG_RUNTIME_DIR": str(session)})
            assert mount.unmount() == 0
    assert list(session.iterdir()) == []
