"""A loader worker: `python -m stamo_dist.data.worker SOCKET MEMORY SHARDS`, three inherited file descriptors.

It serves one connection until that closes, which also happens when the training process dies in whatever way, so no
worker outlives its run.
"""

from __future__ import annotations

import signal
import socket
import struct
import sys
import traceback
from contextlib import suppress

import numpy as np

from stamo_dist.data.reader import BatchReader, ReaderSpec
from stamo_dist.errors import StamoError

#: Sent to a worker: first the length of a ReaderSpec and the spec, then requests: the slot of a batch and its rows, or
#: FORGET and how many shards to unmap, whose views and numbers follow as int64.
LENGTH = struct.Struct("<Q")
REQUEST = struct.Struct("<qQ")
FORGET = -1
#: Sent back for every batch: its status, and the length of the message that follows, which tells what is wrong.
ANSWER = struct.Struct("<BQ")
DONE, BAD_DATA, BUG = range(3)


def receive(connection: socket.socket, size: int) -> bytes:
    """Exactly `size` bytes.

    Raises:
        EOFError: The other end is closed.
        TimeoutError: The first byte does not come within the socket's timeout.
    """
    parts = b""
    while len(parts) < size:
        try:
            part = connection.recv(size - len(parts))
        except TimeoutError:
            if parts:
                continue
            raise
        except ConnectionResetError:
            part = b""
        if not part:
            raise EOFError
        parts += part
    return parts


def serve(connection: socket.socket, memory: int, shards: int) -> None:
    """Fill the slots asked for until the connection closes."""
    # The training process handles these signals and then closes the connection; workers get them too, because a
    # terminal or a cluster signals every process of the job.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    reader: BatchReader | None = None
    spec = ReaderSpec.loads(receive(connection, *LENGTH.unpack(receive(connection, LENGTH.size))), shards)
    while True:
        slot, count = REQUEST.unpack(receive(connection, REQUEST.size))
        if slot == FORGET:
            places = np.frombuffer(receive(connection, 16 * count), "<i8").reshape(-1, 2).tolist()
            if reader is not None:
                reader.forget(places)
            continue
        kind, message = DONE, b""
        try:
            if reader is None:
                reader = BatchReader(spec, spec.memory(memory))
            message = "\n".join(reader.fill(slot, count)).encode()
        except StamoError as e:
            kind, message = BAD_DATA, str(e).encode()
        except Exception:
            kind, message = BUG, traceback.format_exc().encode()
        connection.sendall(ANSWER.pack(kind, len(message)) + message)


if __name__ == "__main__":
    # Raised once the training process has closed the connection, or died.
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        serve(socket.socket(fileno=int(sys.argv[1])), *map(int, sys.argv[2:]))
