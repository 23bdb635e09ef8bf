"""Mount QED copy-on-write overlays of remote disk images as flat raw files."""

__version__ = "0.1.0"
