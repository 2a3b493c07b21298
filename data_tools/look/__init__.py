"""Checking, previewing and measuring converted sources."""
