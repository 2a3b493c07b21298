"""`stamo plan`: a recipe's memory per device, from shapes alone."""
