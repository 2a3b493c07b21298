"""Released checkpoints as people have them, by their headers alone: a login node looks at them without torch."""
