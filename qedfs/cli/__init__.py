"""The command line: click commands, what they print, and the one place that turns an error into an exit status."""
