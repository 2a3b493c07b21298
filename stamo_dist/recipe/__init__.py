"""Recipes: YAML → validated, frozen `Recipe` objects with the file and line of every value."""
