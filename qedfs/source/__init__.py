"""Sources of missing clusters: HTTP, NBD, local files, and qcow2 over each. Only this room connects to servers."""
