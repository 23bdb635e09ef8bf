"""The errors of QMP commands: a QEMU error class and a message."""

from __future__ import annotations


class QmpError(Exception):
    """Becomes an `error` reply. `error_class` is one of QEMU's five (qapi/error.json)."""

    error_class = "GenericError"

    def __init__(self, desc: str) -> None:
        super().__init__(desc)
        self.desc = desc


class CommandNotFound(QmpError):
    """There is no such command, or the negotiation does not allow it yet."""

    error_class = "CommandNotFound"


class DeviceNotActive(QmpError):
    """There is no block job of that name."""

    error_class = "DeviceNotActive"
