"""One QED file on disk: its map, its allocator, its commits, its recovery. Knows no network."""
