"""What a person sees: tables, progress bars, the picture of a map. Values -> lines and pixels."""
