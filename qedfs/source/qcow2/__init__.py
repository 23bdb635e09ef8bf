"""qcow2 images as sources, read-only, over any other source."""

from qedfs.source.qcow2.source import Qcow2Source

__all__ = ["Qcow2Source"]
