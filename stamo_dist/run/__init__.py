"""The run folder: its paths, its state, and who may write into it. Free of torch."""
