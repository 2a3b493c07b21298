"""Who may ask: names of this server (against DNS rebinding), origins of browsers, a token, and the time for headers."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import socket
from base64 import b64decode
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import h11
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from stamo_dist.serve.wire import BadRequestError, to_json

#: Environment variable with the token that clients must give.
TOKEN = "STAMO_SERVE_TOKEN"
_LOCAL = ("localhost", "127.0.0.1", "::1")
_EVERY_ADDRESS = ("0.0.0.0", "::")


@dataclass(frozen=True)
class Allowed:
    """Names under which clients may reach a server, and the token they must know."""

    hosts: frozenset[str] = frozenset(_LOCAL)
    addresses: bool = False  # any IP address is allowed, too: a page cannot rebind one
    token: str | None = field(default=None, repr=False)

    @classmethod
    def on(cls, host: str, more: Sequence[str] = (), token: str | None = None) -> Allowed:
        """For a server that listens on `host`: that name, this machine's and `more`."""
        own = (socket.gethostname(),) if host in _EVERY_ADDRESS else (host,)
        names = {name.lower().strip("[]") for name in (*_LOCAL, *own, *more)}
        return cls(frozenset(names), host in _EVERY_ADDRESS, token)

    def check(self, headers: Headers) -> None:
        """Raises: BadRequestError: The server is called by another name, by a strange web page, or without token."""
        if not self._knows(f"//{headers.get('host', '')}"):
            raise BadRequestError("Host", "is not a name of this server; allow it with --allow-host")
        if "origin" in headers and not self._knows(headers["origin"]):
            raise BadRequestError("Origin", "is a web page that is not this server's; allow it with --allow-host", 403)
        if self.token is not None and not _same(_credentials(headers.get("authorization", "")), self.token):
            raise BadRequestError("Authorization", "holds no token of this server; send 'Bearer TOKEN'", 401)

    def _knows(self, url: str) -> bool:
        try:
            name = (urlsplit(url).hostname or "").lower()
        except ValueError:
            return False
        return name in self.hosts or (self.addresses and _is_address(name))


class Guard:
    """Lets through what `allowed` lets through; ASGI middleware for requests and websockets."""

    def __init__(self, app: ASGIApp, allowed: Allowed):
        self._app, self._allowed = app, allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            try:
                self._allowed.check(Headers(scope=scope))
            except BadRequestError as bad:
                await refusal(bad)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class PromptHeaders(H11Protocol):
    """HTTP of uvicorn, which closes connections whose headers are not whole after `headers_s`."""

    headers_s = 10.0
    _due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop()
        elif self._due is None:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._due = self.loop.call_later(self.headers_s, self.transport.close)

    def _stop(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None


def refusal(bad: BadRequestError) -> Response:
    """What a client is told about its invalid request."""
    headers = {"WWW-Authenticate": "Bearer"} if bad.status == 401 else None
    content = to_json({"error": str(bad), "field": bad.field})
    return Response(content, bad.status, headers, media_type="application/json")


def _credentials(header: str) -> str:
    """The token of `Bearer TOKEN`, of openpi's `Api-Key TOKEN`, or the password of `Basic`, as URLs carry it."""
    scheme, _, given = header.partition(" ")
    if scheme.lower() != "basic":
        return given.strip() if scheme.lower() in ("bearer", "api-key") else ""
    try:
        return b64decode(given, validate=True).decode().partition(":")[2]
    except ValueError:
        return ""


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(), token.encode())


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
