"""What runs a task: strategy, checkpoints, run folder, metrics, signals.

`generation`, `preempt`, `runfolder` and `progress` need no torch.
"""
