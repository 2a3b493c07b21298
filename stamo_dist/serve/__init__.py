"""`stamo serve`: a policy over HTTP and websockets, with the protocols of OpenVLA, OpenVLA-OFT, openpi and vla-eval.

POST /act takes JSON in which arrays are written as json_numpy writes them::

    {"image": uint8 (H, W, 3), "instruction": "…", "unnorm_key": "…"}             OpenVLA → (A,), or (C, A) of a chunk
    {"full_image": …, "wrist_image": …, "state": (P,), "instruction": "…"}         OFT → a list of C actions (A,)
    {"observations": [either of them, …]}                                          many timesteps → a list of answers

and the same JSON encoded as text, {"encoded": "…"}; then the answer has this form, too. GET /health tells what the
policy expects. Websockets speak msgpack: openpi's clients at /, vla-eval's harness at /vla-eval. Invalid requests are
answered with code 400 and the name of the field.
"""

from __future__ import annotations

from stamo_dist.serve.app import Server
from stamo_dist.serve.command import serve

__all__ = ["Server", "serve"]
