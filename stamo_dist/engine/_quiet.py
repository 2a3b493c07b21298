"""Keeps the libraries' notices about their own internals out of a user's log; import it before accelerate.

accelerate imports DeepSpeed, which looks at the environment once, then.
"""

import logging
import os
import warnings

import torch

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*all_gather_into_tensor. is deprecated")
warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
