"""Starting and managing runs: processes on this machine and jobs on a Slurm cluster. Needs no torch."""
