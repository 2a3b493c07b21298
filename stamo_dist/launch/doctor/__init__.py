"""`stamo doctor`: checking an environment before a job is submitted."""
