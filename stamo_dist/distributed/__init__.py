"""The processes of a run and the engine that distributes a module. Free of torch at import, for the launcher."""

import logging
import warnings

# Suppress the libraries' notices about their internals in the user's log. This must precede the first import of
# torch and DeepSpeed.
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*(all_gather_into_tensor|reduce_scatter_tensor). is deprecated")
warnings.filterwarnings("ignore", message="Slicing a flattened dim from root mesh")
# What these return is only read.
warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(FSDP(TokenizerCore|VAE)\) returned a view tensor")
warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
