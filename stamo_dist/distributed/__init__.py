"""The processes of a run and the engine that spreads a module over them. Free of torch at import, for the launcher."""

import logging
import warnings

# The libraries' notices about their own internals do not belong in a user's log. This must precede the first import of
# torch and DeepSpeed.
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*all_gather_into_tensor. is deprecated")
warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
