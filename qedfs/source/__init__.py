"""Where missing bytes come from: HTTP, NBD, local files, qcow2 over each. Only this room connects to servers."""
