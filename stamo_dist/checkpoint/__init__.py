"""Checkpoints: what they hold, which one a run starts from, writing, reading, and loading on other processes."""
