"""What the readers of disk image formats share: tables of two levels that are read on demand, and reads of the file."""
