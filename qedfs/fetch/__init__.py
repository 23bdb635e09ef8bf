"""Fetching from one source: a queue, one flight per cluster, a scheduler for the background. Knows no overlay."""
