"""The NBD source. Read client, connection and transport first, then the parts without I/O: handshake and reply."""

from qedfs.source.nbd.client import NbdSource

__all__ = ["NbdSource"]
