"""A loader worker: `python -m stamo_dist.data.worker SOCKET MEMORY`, two inherited file descriptors.

It serves one connection until that closes, which also happens when the training process dies in whatever way, so no
worker outlives its run.
"""

from __future__ import annotations

import signal
import sys
import traceback
from multiprocessing.connection import Connection

from stamo_dist.data.reader import Reader, ReaderSpec, Slots
from stamo_dist.errors import StamoError


def serve(socket: int, memory: int) -> None:
    """Answer each Work with None once its slot is filled, or with (kind of error, message)."""
    # The training process handles these and then closes the connection; they reach workers too, because a terminal
    # or a cluster signals every process of the job.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    connection = Connection(socket)
    reader: Reader | None = None
    while True:
        try:
            message = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        answer: tuple[str, str] | None = None
        try:
            if isinstance(message, ReaderSpec):
                reader = Reader(message, Slots(message.slots, message.count, memory))
                continue
            assert reader is not None, "the first message must be a ReaderSpec"
            reader.fill(message)
        except StamoError as e:
            answer = ("data", str(e))
        except Exception:
            answer = ("bug", traceback.format_exc())
        try:
            connection.send(answer)
        except (BrokenPipeError, ConnectionResetError):
            return


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
