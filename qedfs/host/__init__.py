"""The host's resources and limits: /proc, runtime folders, file descriptors, memory. Knows nothing of images."""
