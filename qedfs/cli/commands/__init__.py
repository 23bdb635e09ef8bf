"""One module for each command of `qedfs`."""
