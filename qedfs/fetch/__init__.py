"""Fetching from one source: the request queue, its scheduler, congestion window and budget. Knows no overlay."""
