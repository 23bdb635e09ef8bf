"""How an image gets out of qedfs: from an overlay or from a mount, into a raw file, a qcow2 file or a pipe."""
