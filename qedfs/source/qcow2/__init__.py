"""The qcow2 source: reads the virtual disk of a qcow2 image, over any other source that has the file."""

from qedfs.source.qcow2.source import Qcow2Source

__all__ = ["Qcow2Source"]
