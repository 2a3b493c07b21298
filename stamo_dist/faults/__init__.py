"""Stopping runs: shutdown signals, and ending a hung run. Free of torch at import, for the launcher."""
