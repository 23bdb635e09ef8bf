"""The QED source: reads the virtual disk of a QED image, over any other source that has the file."""

from qedfs.source.qed.source import QedSource

__all__ = ["QedSource"]
