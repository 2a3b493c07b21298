"""Starting runs: processes on this machine, jobs on a Slurm cluster, and looking after both. Needs no torch."""
