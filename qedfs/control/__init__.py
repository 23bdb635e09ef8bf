"""How a mount is driven and watched from outside: QMP over a Unix socket, status, metrics."""
