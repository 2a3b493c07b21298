"""`stamo plan`: what a recipe needs of a device's memory, from shapes alone."""
