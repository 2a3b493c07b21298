"""Publishing models: exporting a checkpoint to a folder that other programs read, with a model card."""
