"""A real S3 server (moto) in a process of its own, and a bad line to it."""

from __future__ import annotations

import os
import select
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def server(port: int, **environment: str) -> Iterator[str]:
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, env={**os.environ, **environment}, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, "the S3 server did not start"
            assert time.monotonic() < deadline, "the S3 server did not start"
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@contextmanager
def relay(port: int, allow: Callable[[int], bool]) -> Iterator[str]:
    """A line to a server; a connection ends when `allow`, given the bytes just passed on, says no."""

    class Relay(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with socket.create_connection(("127.0.0.1", port)) as there:
                while True:
                    ready, _, _ = select.select([self.request, there], [], [], 10)
                    for end, other in ((self.request, there), (there, self.request)):
                        if end in ready:
                            if not (data := end.recv(1024)):
                                return
                            other.sendall(data)
                            if not allow(len(data)):
                                return

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        block_on_close = False

    with Server(("127.0.0.1", 0), Relay) as line:
        threading.Thread(target=line.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{line.server_address[1]}"
        line.shutdown()


@contextmanager
def bad_line(port: int, cuts: int) -> Iterator[str]:
    """A line that is cut after every 4000 bytes, `cuts` times."""
    left, passed = cuts, 0

    def allow(size: int) -> bool:
        nonlocal left, passed
        passed += size
        if left and passed > 4000:
            left, passed = left - 1, 0
            return False
        return True

    with relay(port, allow) as url:
        yield url


@contextmanager
def dead_line(port: int, limit: int) -> Iterator[tuple[str, threading.Event]]:
    """A line over which nothing comes any more after `limit` bytes; the event says that it is so."""
    dead, passed = threading.Event(), 0

    def allow(size: int) -> bool:
        nonlocal passed
        passed += size
        if passed > limit:
            dead.set()
            threading.Event().wait()
        return True

    with relay(port, allow) as url:
        yield url, dead


@dataclass
class Traffic:
    """What went over a `far_line`: requests, bytes that came back, and connections that carried any at one time."""

    requests: int = 0
    received: int = 0
    busy: int = 0
    most_busy: int = 0


@contextmanager
def far_line(port: int, latency: float, rate: float) -> Iterator[tuple[str, Traffic]]:
    """A line as to an object store: `latency` seconds before each answer, `rate` bytes/s of it on each connection."""
    traffic, counting = Traffic(), threading.Lock()

    class Far(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with socket.create_connection(("127.0.0.1", port)) as there:
                asking, due = False, 0.0
                while True:
                    ready, _, _ = select.select([self.request, there], [], [], 60)
                    if self.request in ready:
                        if not (data := self.request.recv(1 << 16)):
                            break
                        if not asking:
                            asking = True
                            count(1)
                            time.sleep(latency)
                            due = time.monotonic()
                        there.sendall(data)
                    elif there in ready:
                        if not (data := there.recv(1 << 16)):
                            break
                        if asking:
                            asking = False
                            count(-1)
                        due = max(due, time.monotonic() - 0.05) + len(data) / rate
                        time.sleep(max(0.0, due - time.monotonic()))
                        traffic.received += len(data)
                        self.request.sendall(data)
                    else:
                        break
                if asking:
                    count(-1)

    def count(change: int) -> None:
        with counting:
            traffic.busy += change
            traffic.requests += change > 0
            traffic.most_busy = max(traffic.most_busy, traffic.busy)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        block_on_close = False
        request_queue_size = 64

    with Server(("127.0.0.1", 0), Far) as line:
        threading.Thread(target=line.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{line.server_address[1]}", traffic
        line.shutdown()


def use(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Set the environment that reaches the server at `url`."""
    for name, value in (
        ("S3_ENDPOINT_URL", url),
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_EC2_METADATA_DISABLED", "true"),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
