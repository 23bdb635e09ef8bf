"""One served image: an overlay, its source, and what a read, a write and a flush of it mean."""
