"""Output of a run during training: metrics, samples, images, progress."""
