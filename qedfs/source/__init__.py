"""Sources of missing clusters: HTTP, NBD, local files, qcow2 and QED over each. Only this room connects to servers."""
