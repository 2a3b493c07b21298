"""The HTTP application of one served policy."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import anyio
import numpy as np
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute

from stamo_dist.errors import DataError
from stamo_dist.models.policies import AnyPolicy
from stamo_dist.serve.batching import Batcher
from stamo_dist.serve.guard import Allowed, Guard, refusal
from stamo_dist.serve.limits import DEFAULT, MIB, Limits
from stamo_dist.serve.observation import Moment, Observations
from stamo_dist.serve.sockets import Sockets
from stamo_dist.serve.wire import BadRequestError, Reader, said, to_json

_REMEMBERED = 1000  # requests whose latency /health reports
_LOCAL = Allowed()


class Server:
    """Answers requests for one policy, those that wait together."""

    def __init__(
        self,
        policy: AnyPolicy,
        name: str,
        unnorm_key: str | None = None,
        *,
        upright: bool = False,
        actions: str = "original",
        allowed: Allowed = _LOCAL,
        limits: Limits = DEFAULT,
    ):
        """`unnorm_key`: default of requests without one; `upright`: frames are sent upright and turned here.

        `actions`: openvla if the gripper is 1 open and 0 closed, which vla-eval's benchmarks get as -1 and +1.

        Raises:
            DataError: The policy has no such statistics.
        """
        self.name, self.framing, self.upright = name, policy.framing, upright
        self.policy = policy if upright else replace(policy, framing=policy.framing.as_sent())
        self.key = None if unnorm_key is None else policy.statistics.key(unnorm_key)
        self._allowed, self._limits = allowed, limits
        self._observations = Observations(self.policy, self.key, limits)
        self._batcher = Batcher(self.policy, limits.batch)
        self._closing_positive = actions == "openvla"
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED)
        self._served = 0

    def app(self) -> Starlette:
        cfg = self.policy.cfg
        sockets = Sockets(
            self._observations,
            self._answer,
            self._limits,
            self._about(),
            cfg.views,
            cfg.proprio,
            self._closing_positive,
        )
        return Starlette(
            routes=[
                Route("/act", self.act, methods=["POST"]),
                Route("/health", self.health, methods=["GET"]),
                Route("/healthz", lambda request: PlainTextResponse("OK\n"), methods=["GET"]),
                WebSocketRoute("/", sockets.openpi),
                WebSocketRoute("/vla-eval", sockets.vla_eval),
            ],
            middleware=[Middleware(Guard, allowed=self._allowed)],
        )

    def warm_up(self) -> None:
        """Answer once for nobody: a GPU loads its kernels then, which takes longer than many answers."""
        policy, key = self.policy, self.key or next(iter(self.policy.statistics.sources))
        views = [np.zeros((224, 224, 3), np.uint8)] * policy.cfg.views
        proprio = None
        if policy.cfg.proprio:
            proprio = np.zeros(len(policy.statistics.range(key, "proprio", policy.cfg.bounds)))
        self._batcher.compute([Moment(views, "wait", key, proprio)])

    async def health(self, request: Request) -> Response:
        """The policy, its inputs, and its latency."""
        answered = np.array(self._seconds)
        latency = None
        if len(answered):
            median, slow = (1000 * np.quantile(answered, [0.5, 0.9])).round(2).tolist()
            latency = {"median_ms": median, "90%_ms": slow}
        return _answer({"status": "ok", **self._about(), "requests": self._served, "latency": latency})

    async def act(self, request: Request) -> Response:
        """Answer with actions for one observation or many."""
        try:
            reader = Reader(self._limits)
            payload = await run_in_threadpool(reader.json, await self._body(request), "body")
            if wrapped := set(payload) == {"encoded"}:
                payload = await run_in_threadpool(_unwrapped, reader, payload["encoded"])
            many = self._many(payload)
            if many is None:
                moments = [self._observations.openvla(payload)]
            else:
                moments = [self._observations.openvla(o, f"observations[{i}].") for i, o in enumerate(many)]
            chunks = await self._answer(moments)
        except BadRequestError as bad:
            return refusal(bad)
        except DataError as error:
            return _answer({"error": str(error), "field": None}, status=400)
        answers = [_shape(chunk, moment.listed) for chunk, moment in zip(chunks, moments, strict=True)]
        return _answer(answers[0] if many is None else answers, wrapped=wrapped)

    def _about(self) -> dict[str, Any]:
        cfg = self.policy.cfg
        return {
            "policy": self.name,
            "views": cfg.views,
            "proprio": cfg.proprio,
            "chunk": self.policy.chunk,
            "unnorm_keys": sorted(self.policy.statistics.sources),
            "frames": "upright" if self.upright else self.framing.orientation,
            "framing": self.framing.to_dict(),
            "bounds": cfg.bounds,
            "device": str(self.policy.device),
        }

    async def _answer(self, moments: list[Moment]) -> list[np.ndarray]:
        start = time.perf_counter()
        chunks = await self._batcher.answer(moments)
        self._seconds.append(time.perf_counter() - start)
        self._served += 1
        return chunks

    def _many(self, payload: Mapping[str, Any]) -> list[Any] | None:
        many, most = payload.get("observations"), self._limits.observations
        if many is not None and not (isinstance(many, list) and 1 <= len(many) <= most):
            what = f"has {len(many)}" if isinstance(many, list) else f"is {said(many)}"
            raise BadRequestError("observations", f"{what}; give a list of 1 to {most} observations")
        return many

    async def _body(self, request: Request) -> bytes:
        limits = self._limits
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise BadRequestError("Content-Type", "must be application/json", 415)
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > limits.body:
            raise BadRequestError("body", f"is longer than {limits.body // MIB} MiB", 413)
        body = bytearray()
        try:
            with anyio.fail_after(limits.body_s):
                async for part in request.stream():
                    body += part
                    if len(body) > limits.body:
                        raise BadRequestError("body", f"is longer than {limits.body // MIB} MiB", 413)
        except TimeoutError:
            raise BadRequestError("body", f"did not come within {limits.body_s:g} s", 408) from None
        return bytes(body)


def _unwrapped(reader: Reader, text: Any) -> dict[str, Any]:
    if not isinstance(text, str):
        raise BadRequestError("encoded", f"is {said(text)}; give the request as text")
    return reader.json(text, "encoded")


def _shape(chunk: np.ndarray, listed: bool) -> Any:
    if listed:
        return list(chunk)
    return chunk[0] if len(chunk) == 1 else chunk


def _answer(content: Any, *, status: int = 200, wrapped: bool = False) -> Response:
    text = to_json(content)
    return Response(to_json(text) if wrapped else text, status, media_type="application/json")
