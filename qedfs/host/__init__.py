"""What the machine gives and limits: /proc, runtime folders, descriptors, memory. Knows no images."""
