"""The loop and what happens around it."""
