"""Exit codes of a run. The Slurm job, the local launcher and `stamo chain` read them."""

#: The run is to be started again: it saved because it was asked to stop, or it was hung.
EXIT_PREEMPTED = 75
#: The run finished training and saved, but its model could not be exported.
EXIT_NOT_EXPORTED = 76
#: A second SIGINT, as shells use.
EXIT_INTERRUPTED = 130
#: SIGTERM, as shells use.
EXIT_TERMINATED = 143
