"""Live migration between two real QEMU processes, with a guest that writes all the time and a checker of its disk."""
