"""The background jobs of an image, such as the stream, and when they hold off. Also the prefetch of a boot profile."""
