"""The tokenizer's networks: DINOv2 encoder, compressor, SD3 decoder, VAE, and how their weights are read."""

import stamo_dist._torchvision  # noqa: F401  must precede the first import of transformers, which imports torchvision
