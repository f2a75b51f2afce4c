"""Calls of the manager's REST API on behalf of a user of the hub."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote, urlencode

from tornado.httpclient import AsyncHTTPClient, HTTPClientError, HTTPRequest, HTTPResponse

from .keys import Signer

Json = dict[str, Any]

CONNECT_S = 20.0
REQUEST_S = 30.0
PAGE = 500
_MAX_PAGES = 100
_MAX_REPLY = 32 << 20


class Problem(Exception):
    """A reply that is no success, as the manager's problem (RFC 9457), or no reply at all."""

    def __init__(self, status: int, body: Mapping[str, Any]) -> None:
        super().__init__(str(body.get("detail") or f"HTTP status {status}"))
        self.status = status
        self.body = dict(body)

    @property
    def code(self) -> str:
        """The stable code, ``unavailable`` if there was no reply."""
        return str(self.body.get("code", "unavailable" if self.status >= 500 else "invalid"))

    @classmethod
    def unavailable(cls, reason: str) -> Problem:
        return cls(
            503,
            {
                "code": "unavailable",
                "title": "Unavailable",
                "status": 503,
                "detail": reason,
                "retryable": True,
            },
        )


def path(*parts: str) -> str:
    """Returns a path below ``/api/v1/`` from its parts, whatever is in them."""
    return "/api/v1/" + "/".join(quote(part, safe="") for part in parts)


def client() -> AsyncHTTPClient:
    """Returns an HTTP client of its own, so that long event streams do not take the places of other requests."""
    return AsyncHTTPClient(
        force_instance=True,
        defaults={"connect_timeout": CONNECT_S, "request_timeout": REQUEST_S, "follow_redirects": False},
        max_clients=200,
        max_body_size=_MAX_REPLY,
    )


class Manager:
    """The manager, as one hub sees it."""

    def __init__(self, url: str, signer: Signer) -> None:
        self.url = url.rstrip("/")
        self.signer = signer
        self._client: AsyncHTTPClient | None = None

    @classmethod
    def from_environment(cls) -> Manager:
        """Uses ``UPPERDECK_MANAGER_URL`` and ``UPPERDECK_SIGNING_KEY_FILE``."""
        url, key = os.environ.get("UPPERDECK_MANAGER_URL"), os.environ.get("UPPERDECK_SIGNING_KEY_FILE")
        if not url or not key:
            raise ValueError("UPPERDECK_MANAGER_URL and UPPERDECK_SIGNING_KEY_FILE are not both set")
        return cls(url, Signer.read(Path(key)))

    @property
    def http(self) -> AsyncHTTPClient:
        # Made on first use: it belongs to the event loop that runs then.
        if self._client is None:
            self._client = client()
        return self._client

    async def fetch(
        self,
        method: str,
        target: str,
        token: str | None,
        *,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        streaming: Callable[[bytes], Any] | None = None,
        on_header: Callable[[str], Any] | None = None,
        timeout: float = REQUEST_S,
    ) -> HTTPResponse:
        """Sends one request, and returns its response whatever its status.

        Fails with :class:`Problem` if there is none.
        """
        sent = dict(headers or {})
        if token is not None:
            sent["Authorization"] = f"Bearer {token}"
        request = HTTPRequest(
            self.url + target,
            method=method,
            headers=sent,
            body=body,
            allow_nonstandard_methods=True,
            streaming_callback=streaming,
            header_callback=on_header,
            request_timeout=timeout,
        )
        try:
            return await self.http.fetch(request, raise_error=False)
        except (OSError, HTTPClientError, TimeoutError) as error:
            raise Problem.unavailable(f"the image manager cannot be reached: {error}") from error

    async def call(
        self,
        method: str,
        where: str,
        owner: str,
        *,
        groups: Iterable[str] = (),
        query: Mapping[str, str | int | None] | None = None,
        body: Json | None = None,
        key: str | None = None,
    ) -> Json:
        """Makes one call as ``owner`` and returns the body of its reply.

        Fails with :class:`Problem`.
        """
        given = {name: value for name, value in (query or {}).items() if value is not None}
        target = where + (f"?{urlencode(given)}" if given else "")
        headers = {"Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        if key is not None:
            headers["Idempotency-Key"] = key
        token = self.signer.token(owner, groups=groups)
        sent = None if body is None else json.dumps(body).encode()
        response = await self.fetch(method, target, token, body=sent, headers=headers)
        if response.code == 599:
            raise Problem.unavailable(f"the image manager cannot be reached: {response.error}")
        try:
            said = json.loads(response.body or b"null")
        except ValueError:
            said = None
        if 200 <= response.code < 300:
            return cast(Json, said) if isinstance(said, dict) else {}
        raise Problem(response.code, said if isinstance(said, dict) else {})

    async def entries(
        self,
        where: str,
        name: str,
        owner: str,
        *,
        groups: Iterable[str] = (),
        query: Mapping[str, str | int | None] | None = None,
        limit: int = PAGE,
    ) -> AsyncIterator[Json]:
        """Gives the entries of a list, by pages of ``limit`` as they are needed; ``name`` is their name in a page."""
        cursor: str | None = None
        groups = list(groups)
        for _ in range(_MAX_PAGES):
            asked = {**(query or {}), "limit": limit, "cursor": cursor}
            page = await self.call("GET", where, owner, groups=groups, query=asked)
            for entry in page.get(name, []):
                if isinstance(entry, dict):
                    yield entry
            cursor = page.get("next")
            if cursor is None:
                return

    async def session(self, owner: str, which: str | Json) -> Json | None:
        """Returns the session that the hub knows as ``which``: an ID or name, or namespace and pod."""
        async for session in self.entries(path("sessions"), "sessions", owner):
            # One that has ended, and is still on its node's disk, is not the server that runs now.
            if session.get("ended") is not None:
                continue
            if isinstance(which, str):
                same = session.get("id") == which
            else:
                names = ("namespace", "pod", "container")
                same = all(session.get(name) == which[name] for name in names if which.get(name))
            if same:
                return session
        return None
