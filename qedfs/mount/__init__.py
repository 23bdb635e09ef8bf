"""A mount from start to stop: FUSE, the overlays of a folder, the server process. Only this room knows pyfuse3."""
