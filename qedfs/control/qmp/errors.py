"""What a QMP command can fail with: an error class and a text. A leaf of the control room."""

from __future__ import annotations


class QmpError(Exception):
    """An answer with `error`. `error_class` is one of QEMU's five (qapi/error.json)."""

    error_class = "GenericError"

    def __init__(self, desc: str) -> None:
        super().__init__(desc)
        self.desc = desc


class CommandNotFound(QmpError):
    """No such command, or not in this state of the negotiation."""

    error_class = "CommandNotFound"


class DeviceNotActive(QmpError):
    """No block job of that name."""

    error_class = "DeviceNotActive"
