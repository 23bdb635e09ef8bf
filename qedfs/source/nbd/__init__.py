"""The NBD source. Read in this order: client, connection, transport; then, free of I/O, handshake and reply."""

from qedfs.source.nbd.client import NbdSource

__all__ = ["NbdSource"]
