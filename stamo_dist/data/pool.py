"""The loader's worker processes: batches are assigned to the least busy worker and returned in order.

torch's DataLoader is not used, for three reasons found in practice: it hands every batch over in fresh shared
memory, whose page faults halve the rate of the decoder; its workers are forks of a process that holds CUDA and NCCL
(or import all of it again); and it notices a dead worker only every five seconds.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import subprocess
import sys
import weakref
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from stamo_dist.data.reader import Place, ReaderSpec
from stamo_dist.data.shared_buffers import SharedBuffers
from stamo_dist.data.worker import ANSWER, BAD_DATA, BUG, DONE, FORGET, LENGTH, REQUEST, receive
from stamo_dist.errors import DataError, RunError, StamoError

_log = logging.getLogger(__name__)
_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
_PATIENCE = 60.0  # seconds between two warnings about a batch that does not arrive


class Pool:
    """`workers` processes that fill `buffers`.

    Args:
        spec: The data that the workers read.
        buffers: The shared memory they fill.
        workers: Number of workers.
        stuck: Slot → description of its worker's position, for messages.
        timeout: Seconds to wait for one batch.

    Raises:
        RunError: A worker cannot be started.
    """

    def __init__(
        self, spec: ReaderSpec, buffers: SharedBuffers, workers: int, *, stuck: Callable[[int], str], timeout: float
    ):
        self._stuck, self._timeout = stuck, timeout
        self._order: deque[int] = deque()  # slots submitted and not yet taken
        self._filling: list[list[int]] = [[] for _ in range(workers)]  # assigned to each worker, in order
        self._filled: dict[int, list[str] | StamoError] = {}
        self._workers: list[subprocess.Popen[bytes]] = []
        self._connections: list[socket.socket] = []
        # Also runs when the interpreter exits.
        self._finalizer = weakref.finalize(self, _end, self._workers, self._connections)
        self._answers = select.poll()
        self._worker_of: dict[int, int] = {}
        for worker in range(workers):
            process, connection = _start(buffers.fd, spec.file.fd)
            self._workers.append(process)
            self._connections.append(connection)
            self._answers.register(connection, select.POLLIN)
            self._worker_of[connection.fileno()] = worker
        message = spec.dumps()
        for worker in range(workers):
            self._send(worker, LENGTH.pack(len(message)) + message)

    def submit(self, slot: int, rows: int) -> None:
        """Assign a free slot and its rows to the worker with the fewest slots, so that a slow one delays no other."""
        while answers := self._answers.poll(0):
            for descriptor, _ in answers:
                self._receive(self._worker_of[descriptor])
        worker = min(range(len(self._workers)), key=lambda w: len(self._filling[w]))
        self._send(worker, REQUEST.pack(slot, rows))
        self._filling[worker].append(slot)
        self._order.append(slot)

    def forget(self, places: Sequence[Place]) -> None:
        """Have all workers unmap these shards, given by view and number."""
        if places:
            message = REQUEST.pack(FORGET, len(places)) + np.array(places, "<i8").tobytes()
            for worker in range(len(self._workers)):
                self._send(worker, message)

    def __len__(self) -> int:
        """Batches that were submitted and not taken yet."""
        return len(self._order)

    def take(self) -> tuple[int, list[str]]:
        """Wait until the slot submitted first is filled; returns it, and messages about replaced samples.

        Raises:
            DataError: The batch cannot be read, or does not arrive in time.
            RunError: A worker died.
        """
        slot, waited = self._order.popleft(), 0.0
        while slot not in self._filled:
            worker = next(w for w, slots in enumerate(self._filling) if slot in slots)
            try:
                self._receive(worker)
            except TimeoutError:
                waited += _PATIENCE
                where = f"loader worker {worker} is at {self._stuck(slot)}"
                if waited >= self._timeout:
                    raise DataError(f"no batch for {waited:.0f} s (data.timeout): {where}") from None
                _log.warning("waiting for a batch for %.0f s; %s", waited, where)
        wrong = self._filled.pop(slot)
        if isinstance(wrong, StamoError):
            raise wrong
        return slot, wrong

    def _receive(self, worker: int) -> None:
        """Read a worker's answer for its oldest slot.

        Raises:
            RunError: It died.
            TimeoutError: No answer arrives.
        """
        connection = self._connections[worker]
        try:
            kind, size = ANSWER.unpack(receive(connection, ANSWER.size))
            message = receive(connection, size).decode() if size else ""
        except TimeoutError:
            raise
        except (EOFError, OSError):
            raise self._death(worker) from None
        outcomes: dict[int, list[str] | StamoError] = {
            DONE: message.splitlines(),
            BAD_DATA: DataError(message),
            BUG: RunError(f"loader worker {worker} failed:\n{message}"),
        }
        self._filled[self._filling[worker].pop(0)] = outcomes[kind]

    def _send(self, worker: int, message: bytes) -> None:
        try:
            self._connections[worker].sendall(message)
        except OSError:
            raise self._death(worker) from None

    def _death(self, worker: int) -> RunError:
        process = self._workers[worker]
        try:
            code = process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return RunError(f"loader worker {worker} (pid {process.pid}) closed its connection; see its output above")
        why = {
            -signal.SIGKILL: "killed, most likely for want of memory: lower data.workers or data.prefetch",
            -signal.SIGBUS: "bus error: a shard was truncated, or its disk failed, while it was read",
        }.get(code, f"exit code {code}; see its output above")
        return RunError(f"loader worker {worker} (pid {process.pid}) died: {why}")

    def close(self) -> None:
        """Stop the workers; they have exited when this returns."""
        self._finalizer()


def _start(*inherited: int) -> tuple[subprocess.Popen[bytes], socket.socket]:
    ours, theirs = socket.socketpair()
    path = os.pathsep.join(entry for entry in sys.path if entry)
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "stamo_dist.data.worker", *map(str, (theirs.fileno(), *inherited))]
    # The mask is inherited, so a signal that arrives before the worker ignores signals does not end it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        with theirs:
            fds = (theirs.fileno(), *inherited)
            process = subprocess.Popen(command, pass_fds=fds, env=env, stdin=subprocess.DEVNULL)
    except OSError as e:
        ours.close()
        raise RunError(f"a loader worker cannot be started: {e}; lower data.workers") from e
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    ours.settimeout(_PATIENCE)
    return process, ours


def _end(workers: list[subprocess.Popen[bytes]], connections: list[socket.socket]) -> None:
    for connection in connections:
        connection.close()
    for process in workers:
        # A worker only reads, so it can be stopped anywhere.
        process.kill()
        process.wait()
    workers.clear()
    connections.clear()
