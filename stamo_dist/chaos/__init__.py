"""`stamo chaos`: train under random faults and compare every step with a training that was left alone."""
