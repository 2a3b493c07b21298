"""The tokenizer's networks: DINOv2 encoder, compressor, SD3 decoder, VAE, and how their weights are read."""

from stamo_dist.models._torchvision import declare_missing_operators

declare_missing_operators()  # must precede the first import of transformers, which imports torchvision
