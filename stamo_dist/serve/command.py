"""Opening a policy, and answering until asked to stop."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from stamo_dist.device import Device
from stamo_dist.errors import RunError
from stamo_dist.models.openvla.actions import SETTINGS
from stamo_dist.models.openvla.framing import AS_RECORDED, Use
from stamo_dist.models.policies import load_policy
from stamo_dist.recipe.load import load
from stamo_dist.run.folder import RunFolder
from stamo_dist.serve.app import Server
from stamo_dist.serve.guard import TOKEN, Allowed, PromptHeaders
from stamo_dist.serve.limits import DEFAULT, Limits

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Address:
    """Where a server listens, and the names under which clients may reach it besides.

    Attributes:
        host: Address to listen on.
        port: Port; 0 takes a free one.
        allow: Names of this server in requests, besides the address and localhost.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    allow: Sequence[str] = ()

    def listen(self) -> socket.socket:
        """Raises: RunError: It cannot be listened on."""
        try:
            family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
            listening = socket.create_server((self.host, self.port), family=family)
        except OSError as e:
            raise RunError(
                f"--host {self.host} --port {self.port}: cannot be listened on ({e.strerror}); choose another"
            ) from None
        # Connections inherit both. Without the first an answer's second packet waits 40 ms for the client to
        # acknowledge the first; the second finds clients that vanished.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return listening

    @property
    def is_local(self) -> bool:
        return self.host in ("localhost", "::1") or self.host.startswith("127.")


def serve(
    path: Path,
    address: Address,
    *,
    device: str | None = None,
    tokenizer: Path | None = None,
    unnorm_key: str | None = None,
    frames: str = "as-trained",
    use: Use = AS_RECORDED,
    limits: Limits = DEFAULT,
) -> None:
    """Load the policy of a run or an export and answer until asked to stop.

    `frames`: as clients send them: turned as in the policy's training, or upright. `use`: settings that a policy of
    others lacks.

    Raises:
        CheckpointError: The policy cannot be found.
        DataError: It has no such statistics.
        RunError: The folder holds no policy, the address cannot be listened on, there is no such device, or it is not
            said how the policy sees frames.
    """
    if frames not in ("as-trained", "upright"):
        raise RunError(f"--frames {frames}: must be as-trained or upright")
    check_stage(path)
    allowed = Allowed.on(address.host, address.allow, token())
    listening = address.listen()
    on = Device.named(device)
    options = {} if tokenizer is None else {"tokenizer": tokenizer}
    policy = load_policy(path, use=use, device=str(on.torch_device), **options)
    server = Server(
        policy, str(path), unnorm_key, upright=frames == "upright", allowed=allowed, limits=limits,
        actions=use.named.actions if use.named else "original",
    )  # fmt: skip
    if on.is_gpu:
        server.warm_up()
    host, port = listening.getsockname()[:2]
    _tell(server, path, f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    if allowed.token is None and not address.is_local:
        log.warning("anybody who reaches this address can use the policy: set %s to ask for a token", TOKEN)
    uvicorn.Server(configured(server, limits)).run(sockets=[listening])


def configured(server: Server, limits: Limits = DEFAULT) -> uvicorn.Config:
    """How uvicorn runs a server: nothing of a client is trusted, and nothing waits for one for ever."""
    http = type("PromptHeaders", (PromptHeaders,), {"headers_s": limits.headers_s})
    return uvicorn.Config(
        server.app(),
        log_level="warning",
        http=http,
        ws="auto",
        ws_max_size=limits.body,
        ws_ping_interval=None,  # a simulator that computes for long does not answer pings
        ws_per_message_deflate=False,
        limit_concurrency=limits.connections + 1,  # uvicorn refuses the one that makes them as many
        timeout_graceful_shutdown=10,
        proxy_headers=False,
        server_header=False,
    )


def token() -> str | None:
    """The token that clients must give, from the environment; None: none is asked for.

    Raises:
        RunError: It is set and empty, or holds what a header cannot.
    """
    found = os.environ.get(TOKEN)
    if found is not None and not (found.strip() == found and found.isascii() and found.isprintable() and found):
        raise RunError(f"{TOKEN}: must be printable ASCII without spaces around it, and not empty; or unset it")
    return found


def check_stage(path: Path) -> None:
    """Raises: RunError: The folder is a run or an export that is no policy."""
    run = RunFolder(path)
    if any((folder / SETTINGS).is_file() for folder in (path, run.model)):
        return
    if run.resolved.is_file() and (stage := load(run.resolved).recipe.stage) != "policy":
        raise RunError(f"{path}: its recipe trains the {stage} stage; give the run folder of a policy")
    for folder in (path, run.model):
        if (folder / "stamo.json").is_file():
            raise RunError(f"{folder}: is a StaMo tokenizer, which acts on nothing; give the folder of a policy")


def _tell(server: Server, path: Path, place: str) -> None:
    policy, views = server.policy, server.policy.cfg.views
    sent = "upright" if server.upright else f"{server.framing.orientation.replace('_', ' ')} already"
    print(f"{path} answers at http://{place}/act", flush=True)
    print(
        f"it sees {views} view{'s' * (views > 1)}, {server.framing.said()}, and is sent them {sent}; "
        f"{policy.chunk} actions at a time, scaled by {policy.cfg.bounds}",
        flush=True,
    )
    print(f"openpi's clients: ws://{place}   vla-eval: ws://{place}/vla-eval", flush=True)
