"""One QED overlay on disk: cluster map, allocation, commit, journal and recovery. Knows no network."""
