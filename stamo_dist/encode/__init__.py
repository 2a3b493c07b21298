"""Caching what frozen models make of every frame, beside the shards."""
