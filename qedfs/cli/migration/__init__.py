"""`qedfs migrate`: what it asks of the two QEMUs, of the mount and of the server of the source's disk."""
