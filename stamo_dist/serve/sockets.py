"""Websockets: openpi's clients and vla-eval's harness, with their own messages.

openpi    the server tells about itself; then each observation is answered with `actions` (C, A); errors are text
vla-eval  HELLO is answered with HELLO, each OBSERVATION with one ACTION (A,) of a chunk that is kept for the episode,
          or with ERROR
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import anyio
import numpy as np
from starlette.concurrency import run_in_threadpool
from starlette.websockets import WebSocket, WebSocketDisconnect

from stamo_dist.errors import DataError
from stamo_dist.serve.limits import Limits
from stamo_dist.serve.observation import Moment, Observations
from stamo_dist.serve.wire import BadRequestError, Reader, printable, said, to_openpi, to_vla_eval

_TOO_LONG_SILENT = 1001
_VLA_EVAL_VERSION = 1
Answer = Callable[[list[Moment]], Awaitable[list[np.ndarray]]]


@dataclass
class Sockets:
    """The endpoints of one server.

    Attributes:
        observations: Checks what comes.
        answer: The chunk (C, A) of each observation.
        about: What an openpi client is told when it connects.
        views, proprio: What vla-eval's benchmarks are asked to send.
        closing_positive: vla-eval's benchmarks get the gripper as -1 open, +1 closed from a policy whose 1 is open.
    """

    observations: Observations
    answer: Answer
    limits: Limits
    about: dict[str, Any]
    views: int
    proprio: bool
    closing_positive: bool = False
    _open: set[WebSocket] = field(default_factory=set)

    async def openpi(self, socket: WebSocket) -> None:
        """Serve one client of openpi."""
        await self._serve(socket, to_openpi(self.about), self._openpi)

    async def vla_eval(self, socket: WebSocket) -> None:
        """Serve one vla-eval harness."""
        episode = _Episode(self)
        await self._serve(socket, None, episode.reply)

    async def _serve(
        self, socket: WebSocket, greeting: bytes | None, reply: Callable[[bytes], Awaitable[bytes | str | None]]
    ) -> None:
        if len(self._open) >= self.limits.connections:
            await socket.close(1013, "too many clients")
            return
        self._open.add(socket)
        try:
            await socket.accept()
            if greeting is not None:
                await socket.send_bytes(greeting)
            while True:
                with anyio.fail_after(self.limits.idle_s):
                    message = await socket.receive()
                if message["type"] == "websocket.disconnect":
                    return
                found = await reply(message.get("bytes") or (message.get("text") or "").encode())
                if found is not None:
                    await (socket.send_text(found) if isinstance(found, str) else socket.send_bytes(found))
        except TimeoutError:
            await socket.close(_TOO_LONG_SILENT, f"nothing came for {self.limits.idle_s:g} s")
        except WebSocketDisconnect:
            return
        finally:
            self._open.discard(socket)

    async def _openpi(self, data: bytes) -> bytes | str:
        start = time.perf_counter()
        try:
            given = await self.read(data)
            (chunk,) = await self.answer([self.observations.openpi(given)])
        except (BadRequestError, DataError) as error:
            return printable(str(error))
        took = 1000 * (time.perf_counter() - start)
        return to_openpi({"actions": chunk, "server_timing": {"infer_ms": took}})

    async def read(self, data: bytes) -> dict[Any, Any]:
        return await run_in_threadpool(Reader(self.limits).msgpack, data, "message")


class _Episode:
    """What is left of the last chunk in one session of vla-eval."""

    def __init__(self, sockets: Sockets):
        self._sockets = sockets
        self._rest: deque[np.ndarray] = deque()

    async def reply(self, data: bytes) -> bytes | None:
        seq = 0
        try:
            message = await self._sockets.read(data)
            seq = number if type(number := message.get("seq")) is int else 0
            kind, payload = message.get("type"), message.get("payload")
            if not isinstance(payload, dict):
                raise BadRequestError("payload", f"is {said(payload)}, not a map")
            if not isinstance(kind, str):
                raise BadRequestError("type", f"is {said(kind)}, not a text")
            if kind == "hello":
                return _message("hello", self._hello(), seq)
            if kind in ("episode_start", "episode_end"):
                self._rest.clear()
                return None
            if kind != "observation":
                raise BadRequestError("type", "is not hello, observation, episode_start or episode_end")
            return _message("action", {"actions": await self._act(payload)}, seq)
        except (BadRequestError, DataError) as error:
            return _message("error", {"error": printable(str(error))}, seq)

    async def _act(self, payload: dict[Any, Any]) -> np.ndarray:
        moment = self._sockets.observations.vla_eval(payload)
        if not self._rest:
            (chunk,) = await self._sockets.answer([moment])
            self._rest.extend(chunk)
        action = self._rest.popleft().astype(np.float32)
        if self._sockets.closing_positive:
            action[-1] = -np.sign(2 * action[-1] - 1)
        return action

    def _hello(self) -> dict[str, Any]:
        sockets = self._sockets
        wanted = {"send_wrist_image": sockets.views > 1, "send_state": sockets.proprio}
        return {
            "harness_version": f"stamo-dist {version('stamo-dist')}",
            "protocol_version": _VLA_EVAL_VERSION,
            "model_server": str(sockets.about["policy"]),
            "capabilities": {},
            "observation_params": {name: True for name, asked in wanted.items() if asked},
        }


def _message(kind: str, payload: dict[str, Any], seq: int) -> bytes:
    return to_vla_eval({"type": kind, "payload": payload, "seq": seq, "timestamp": time.time()})
