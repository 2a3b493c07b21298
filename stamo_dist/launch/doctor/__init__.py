"""`stamo doctor`: what is wrong with an environment, before a job is burnt on it."""
