"""What a long command that is no training says when it is ended: what is kept, and the command that goes on."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from stamo_dist.exit_codes import EXIT_TERMINATED

_inside = False  # of `says_if_ended`


@contextmanager
def says_if_ended(kept: str, again: Sequence[str] = ()) -> Iterator[None]:
    """Inside, SIGTERM ends this process at once, also if a launcher has blocked it; rank 0 says so, with code 143.

    Of Ctrl-C it says the same, and leaves it to the caller.

    `kept`: what the same command finds of its work when it is given again, as a sentence; "" for nothing. `again`: the
    words after `stamo` of the command that goes on, if it is another one. Called in the main thread. Other ranks, and
    processes forked off this one, are ended in silence.
    """
    global _inside
    if os.environ.get("RANK", "0") != "0":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        yield
        return
    out, into = os.pipe()
    os.set_blocking(into, False)
    handler, descriptor = signal.signal(signal.SIGTERM, _nothing), signal.set_wakeup_fd(into, warn_on_full_buffer=False)
    # A thread reads it: Python runs no handler while the main one is inside of a collective.
    threading.Thread(target=_listen, args=(out, _text("SIGTERM", kept, again)), name="ended", daemon=True).start()
    _inside = True
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    try:
        yield
    except KeyboardInterrupt:
        print(_text("Ctrl-C", kept, again), end="", file=sys.stderr, flush=True)
        raise
    finally:
        _inside = False
        signal.set_wakeup_fd(descriptor)
        signal.signal(signal.SIGTERM, handler)
        os.close(into)


def _listen(pipe: int, text: str) -> None:
    while numbers := os.read(pipe, 64):
        if signal.SIGTERM in numbers:
            os.write(2, text.encode())
            os._exit(EXIT_TERMINATED)
    os.close(pipe)


def _text(what: str, kept: str, other: Sequence[str]) -> str:
    words, ranks = other or sys.argv[1:], os.environ.get("WORLD_SIZE", "1")
    if ranks != "1" and "STAMO_LAUNCHED" in os.environ and "--nproc" not in words:  # of a rank's command
        words = [*words, "--nproc", ranks]
    again = f"`{shlex.join(['stamo', *words])}` {'goes on' if kept else 'begins anew'}"
    return f"{chr(10) * sys.stderr.isatty()}ended by {what}; {kept or 'nothing is kept'}: {again}\n"


def _nothing(*_: object) -> None:
    """A handler must exist for the signal's number to be written to the pipe."""


def _mask(how: int) -> None:
    if _inside:
        signal.pthread_sigmask(how, {signal.SIGTERM})


def _in_child() -> None:
    if _inside:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _mask(signal.SIG_UNBLOCK)


# Until a child has left the pipe, its signals would be taken for this process's.
os.register_at_fork(
    before=lambda: _mask(signal.SIG_BLOCK),
    after_in_parent=lambda: _mask(signal.SIG_UNBLOCK),
    after_in_child=_in_child,
)
