"""Checking released checkpoints in their usual forms by headers alone, without torch (for login nodes)."""
