"""`stamo chaos`: train under random faults and compare every step with an undisturbed training."""
