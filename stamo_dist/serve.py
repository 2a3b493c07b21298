"""`stamo serve`: a policy over HTTP, with the protocol of the servers of OpenVLA and OpenVLA-OFT.

POST /act takes JSON in which arrays are written as json_numpy writes them::

    {"image": uint8 (H, W, 3), "instruction": "…", "unnorm_key": "…"}             OpenVLA → (A,), or (C, A) of a chunk
    {"full_image": …, "wrist_image": …, "state": (P,), "instruction": "…"}         OFT → a list of C actions (A,)
    {"observations": [either of them, …]}                                          many timesteps → a list of answers

and the same JSON encoded as text, {"encoded": "…"}; then the answer has this form, too. GET /health tells what the
policy expects. Invalid requests are answered with code 400 and the name of the field.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import json_numpy
import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from stamo_dist.device import Device
from stamo_dist.errors import DataError, RunError
from stamo_dist.models.openvla.framing import AS_RECORDED, Use
from stamo_dist.models.policies import AnyPolicy, load_policy

_REMEMBERED = 1000  # requests whose latency /health reports
_LARGEST = 256 << 20  # bytes of a request


class BadRequestError(Exception):
    """An invalid request: the field, and the problem."""

    def __init__(self, field: str, problem: str):
        super().__init__(f"{field}: {problem}")
        self.field, self.problem = field, problem


@dataclass(frozen=True)
class Moment:
    """One observation of a request, checked."""

    views: list[np.ndarray]
    instruction: str
    key: str
    proprio: np.ndarray | None
    listed: bool  # answer with a list of actions, as OFT's clients expect


class Server:
    """Answers requests for one policy, one at a time."""

    def __init__(self, policy: AnyPolicy, name: str, unnorm_key: str | None = None, *, upright: bool = False):
        """`unnorm_key`: default of requests without one; `upright`: frames are sent upright and turned here.

        Raises:
            DataError: The policy has no such statistics.
        """
        self.name, self.framing, self.upright = name, policy.framing, upright
        self.policy = policy if upright else replace(policy, framing=policy.framing.as_sent())
        self.key = None if unnorm_key is None else policy.statistics.key(unnorm_key)
        self._lock = asyncio.Lock()
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED)
        self._served = 0

    def app(self) -> Starlette:
        return Starlette(
            routes=[Route("/act", self.act, methods=["POST"]), Route("/health", self.health, methods=["GET"])]
        )

    def warm_up(self) -> None:
        """Answer once for nobody: a GPU loads its kernels then, which takes longer than many answers."""
        policy, key = self.policy, self.key or next(iter(self.policy.statistics.sources))
        views = [np.zeros((224, 224, 3), np.uint8)] * policy.cfg.views
        proprio = None
        if policy.cfg.proprio:
            proprio = np.zeros(len(policy.statistics.range(key, "proprio", policy.cfg.bounds)))
        self._compute([Moment(views, "wait", key, proprio, listed=False)])

    async def health(self, request: Request) -> Response:
        """The policy, its inputs, and its latency."""
        cfg, answered = self.policy.cfg, np.array(self._seconds)
        latency = None
        if len(answered):
            median, slow = (1000 * np.quantile(answered, [0.5, 0.9])).round(2).tolist()
            latency = {"median_ms": median, "90%_ms": slow}
        return _answer(
            {
                "status": "ok",
                "policy": self.name,
                "views": cfg.views,
                "proprio": cfg.proprio,
                "chunk": self.policy.chunk,
                "unnorm_keys": sorted(self.policy.statistics.sources),
                "frames": "upright" if self.upright else self.framing.orientation,
                "framing": self.framing.to_dict(),
                "bounds": cfg.bounds,
                "device": str(self.policy.device),
                "requests": self._served,
                "latency": latency,
            }
        )

    async def act(self, request: Request) -> Response:
        """Answer with actions for one observation or many."""
        wrapped = False
        start = time.perf_counter()
        try:
            payload = await _read(request)
            if wrapped := set(payload) == {"encoded"}:
                payload = _decode(payload["encoded"], "encoded")
            many = payload.get("observations")
            if many is not None and not (isinstance(many, list) and many):
                raise BadRequestError("observations", "is not a list with at least one observation")
            given = [payload] if many is None else many
            moments = [self._check(o, "" if many is None else f"observations[{i}].") for i, o in enumerate(given)]
            async with self._lock:
                chunks = await run_in_threadpool(self._compute, moments)
        except BadRequestError as bad:
            return _answer({"error": str(bad), "field": bad.field}, status=400)
        except DataError as error:
            return _answer({"error": str(error), "field": None}, status=400)
        answers = [_shape(chunk, moment.listed) for chunk, moment in zip(chunks, moments, strict=True)]
        self._seconds.append(time.perf_counter() - start)
        self._served += 1
        return _answer(answers[0] if many is None else answers, wrapped=wrapped)

    def _compute(self, moments: list[Moment]) -> list[np.ndarray]:
        """The chunk (C, A) for each observation; those of one source are batched."""
        found: dict[int, np.ndarray] = {}
        for key in dict.fromkeys(moment.key for moment in moments):
            rows = [i for i, moment in enumerate(moments) if moment.key == key]
            asked = [moments[i] for i in rows]
            felt = [moment.proprio for moment in asked if moment.proprio is not None]
            proprio = np.stack(felt) if self.policy.cfg.proprio else None
            views, instructions = [moment.views for moment in asked], [moment.instruction for moment in asked]
            chunks = self.policy.act_batch(views, instructions, unnorm_key=key, proprio=proprio)
            found.update(zip(rows, chunks, strict=True))
        return [found[i] for i in range(len(moments))]

    def _check(self, given: Any, prefix: str) -> Moment:
        if not isinstance(given, Mapping):
            raise BadRequestError(prefix.rstrip(".") or "body", "is not a map")
        text = given.get("instruction")
        if not isinstance(text, str) or not text.strip():
            raise BadRequestError(f"{prefix}instruction", "is missing; say what the robot is to do")
        try:
            key = self.policy.statistics.key(given.get("unnorm_key") or self.key)
        except DataError as error:
            raise BadRequestError(f"{prefix}unnorm_key", str(error)) from None
        return Moment(self._views(given, prefix), text, key, self._proprio(given, key, prefix), "full_image" in given)

    def _views(self, given: Mapping[str, Any], prefix: str) -> list[np.ndarray]:
        """The cameras' images, the third-person one first."""
        wanted = self.policy.cfg.views
        first = next((name for name in ("full_image", "image") if name in given), None)
        if first is None:
            raise BadRequestError(f"{prefix}image", "is missing; give uint8 (H, W, 3), or OFT's full_image")
        pictures = given[first] if isinstance(given[first], list) else [given[first]]
        named = {first if len(pictures) == 1 else f"{first}[{i}]": picture for i, picture in enumerate(pictures)}
        if first == "full_image" and wanted > 1:
            named |= {name: value for name, value in given.items() if "wrist" in name}
        for name, picture in named.items():
            if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8 or picture.shape[2:] != (3,):
                what = f"{picture.dtype} {picture.shape}" if isinstance(picture, np.ndarray) else type(picture).__name__
                raise BadRequestError(f"{prefix}{name}", f"is {what}; give uint8 (H, W, 3), written by json_numpy")
        if len(named) != wanted:
            raise BadRequestError(
                f"{prefix}{first}", f"{len(named)} views ({', '.join(named)}), the policy looks at {wanted}"
            )
        return list(named.values())

    def _proprio(self, given: Mapping[str, Any], key: str, prefix: str) -> np.ndarray | None:
        if not self.policy.cfg.proprio:
            return None
        name = "proprio" if "proprio" in given else "state"
        if name not in given:
            raise BadRequestError(f"{prefix}state", "is missing; this policy reads proprioception")
        size = len(self.policy.statistics.range(key, "proprio", self.policy.cfg.bounds))
        try:
            values = np.asarray(given[name], np.float64)
        except (TypeError, ValueError):
            raise BadRequestError(f"{prefix}{name}", "is not an array of numbers") from None
        if values.shape != (size,) or not np.isfinite(values).all():
            raise BadRequestError(f"{prefix}{name}", f"has shape {values.shape}; {size} finite numbers are wanted")
        return values


def serve(
    path: Path,
    *,
    host: str,
    port: int,
    device: str | None = None,
    tokenizer: Path | None = None,
    unnorm_key: str | None = None,
    frames: str = "as-trained",
    use: Use = AS_RECORDED,
) -> None:
    """Load the policy of a run or an export and answer until asked to stop.

    `frames`: as clients send them: turned as in the policy's training, or upright. `use`: settings that a policy of
    others lacks.

    Raises:
        CheckpointError: The policy cannot be found.
        DataError: It has no such statistics.
        RunError: The address cannot be listened on, there is no such device, or it is not said how the policy sees
            frames.
    """
    if frames not in ("as-trained", "upright"):
        raise RunError(f"--frames {frames}: must be as-trained or upright")
    try:
        listening = socket.create_server((host, port))
    except OSError as e:
        raise RunError(f"--host {host} --port {port}: cannot be listened on ({e.strerror}); choose another") from None
    # Connections inherit it; without it an answer's second packet waits 40 ms for the client to acknowledge the first.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    on = Device.named(device)
    options = {} if tokenizer is None else {"tokenizer": tokenizer}
    policy = load_policy(path, use=use, device=str(on.torch_device), **options)
    server = Server(policy, str(path), unnorm_key, upright=frames == "upright")
    if on.is_gpu:
        server.warm_up()
    app, cfg = server.app(), policy.cfg
    host, port = listening.getsockname()[:2]
    sent = "upright" if server.upright else f"{policy.framing.orientation.replace('_', ' ')} already"
    print(f"{path} answers at http://{host}:{port}/act", flush=True)
    print(
        f"it sees {cfg.views} view{'s' * (cfg.views > 1)}, {policy.framing.said()}, and is sent them {sent}; "
        f"{policy.chunk} actions at a time, scaled by {cfg.bounds}",
        flush=True,
    )
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])


async def _read(request: Request) -> dict[str, Any]:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > _LARGEST:
            raise BadRequestError("body", f"is longer than {_LARGEST >> 20} MiB")
    return _decode(bytes(body), "body")


def _decode(text: Any, field: str) -> dict[str, Any]:
    try:
        payload = json_numpy.loads(text)
    except (ValueError, TypeError, KeyError, SyntaxError) as error:
        raise BadRequestError(field, f"is not JSON as json_numpy writes it ({error})") from None
    if not isinstance(payload, dict):
        raise BadRequestError(field, "is not a map")
    return payload


def _shape(chunk: np.ndarray, listed: bool) -> Any:
    if listed:
        return list(chunk)
    return chunk[0] if len(chunk) == 1 else chunk


def _answer(content: Any, *, status: int = 200, wrapped: bool = False) -> Response:
    text = json_numpy.dumps(content)
    return Response(json.dumps(text) if wrapped else text, status, media_type="application/json")
