"""Measurements of a trained tokenizer, one file each. Every result says which recipe, data and weights made it."""
