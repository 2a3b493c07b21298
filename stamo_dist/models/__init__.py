"""The tokenizer's networks: DINOv2 encoder, compressor, SD3 decoder, VAE, and how their weights are read."""

import stamo_dist._torchvision  # noqa: F401  # isort: skip  must precede transformers, which imports torchvision
import diffusers.utils
from diffusers.utils import import_utils as _diffusers
from transformers.utils import import_utils as _transformers

# Both libraries import these, if installed, for losses, samplers and adapters that are not used here, which takes more
# than half a second.
_diffusers._scipy_available = _diffusers._peft_available = _transformers._scipy_available = False
diffusers.utils.USE_PEFT_BACKEND = False
