"""Shards, mixtures and the loader. Loader workers import this package, so it imports nothing itself."""
