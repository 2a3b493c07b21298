"""Is a converted source right? Check it, look at it, measure it."""
