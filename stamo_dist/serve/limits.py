"""What a served policy takes from its clients at most."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Limits of one server; a request beyond one of them is refused before the policy sees it.

    Attributes:
        body: Bytes of a request, or of a message of a websocket.
        decoded: Bytes of all arrays of a request, images decompressed.
        side: Pixels of an image's height and width.
        text: Bytes of an instruction in UTF-8. A token is one byte at least, and a policy's context is 2048 tokens.
        observations: Timesteps in one request.
        batch: Timesteps computed at once, of one client or of many.
        headers_s: Seconds for a request's headers.
        body_s: Seconds for a request's body.
        idle_s: Seconds of silence after which a websocket is closed.
        connections: Clients connected at once.
    """

    body: int = 32 * MIB
    decoded: int = 128 * MIB
    side: int = 4096
    text: int = 1000
    observations: int = 32
    batch: int = 16
    headers_s: float = 10.0
    body_s: float = 30.0
    idle_s: float = 3600.0
    connections: int = 64


DEFAULT = Limits()
