"""What the exit code of a run says to whoever started it. Slurm's job, the local launcher and `stamo chain` read it."""

#: Exit code of a run that left in order to be started again: it saved because it was asked to stop, or it was hung.
EXIT_PREEMPTED = 75
#: Exit code of a run that was trained to its end and saved, but whose model could not be written.
EXIT_NOT_EXPORTED = 76
#: Exit code of a second SIGINT, as of a shell's.
EXIT_INTERRUPTED = 130
