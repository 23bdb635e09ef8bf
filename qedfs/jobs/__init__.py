"""The background jobs of an image: the stream, the prefetch of a boot profile, and when they hold off."""
