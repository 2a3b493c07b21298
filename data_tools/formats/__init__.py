"""A Reader for each source format, and what they share."""
