"""Measurements of trained models, one file each. Every result records its recipe, data and weights."""
