"""Checkpoints: content, selection, writing, reading, and loading on other numbers of processes."""
