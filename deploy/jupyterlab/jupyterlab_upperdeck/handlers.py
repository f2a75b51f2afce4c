"""The addresses below ``/upperdeck/`` of a Jupyter server.

They are for the server's own user, whom Jupyter Server has checked; the request to the hub's service has the server's
own token, which the page never sees.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from jupyter_server.base.handlers import APIHandler
from jupyter_server.utils import url_path_join
from tornado import iostream, web
from tornado.httpclient import AsyncHTTPClient, HTTPClientError, HTTPRequest

_SAVE = r"([0-9a-f-]{36})"
_MAX_BODY = 64 << 10
_STREAM_S = 24 * 3600.0
_ANSWER_S = 60.0


def service() -> tuple[str, str] | None:
    """Returns the URL of the hub's service, with a slash at its end, and this server's token; `None`: not set up."""
    url, token = os.environ.get("UPPERDECK_SERVICE_URL"), os.environ.get("JUPYTERHUB_API_TOKEN")
    if not url or not token:
        return None
    return url.rstrip("/") + "/", token


class ServiceHandler(APIHandler):
    """Passes one call to the service, and its reply back."""

    _client: AsyncHTTPClient | None = None
    gone = False

    def on_connection_close(self) -> None:
        super().on_connection_close()
        self.gone = True

    @classmethod
    def client(cls) -> AsyncHTTPClient:
        # Its own, so that event streams do not take the places of other requests of the server.
        if ServiceHandler._client is None:
            ServiceHandler._client = AsyncHTTPClient(force_instance=True, max_clients=50)
        return ServiceHandler._client

    def problem(self, status: int, code: str, detail: str) -> None:
        self.set_status(status)
        self.set_header("Content-Type", "application/problem+json")
        self.finish(json.dumps({"status": status, "code": code, "detail": detail, "retryable": status >= 500}))

    async def forward(self, method: str, where: str, *, body: bytes | None = None, stream: bool = False) -> None:
        """Sends a request to the service and ends the response with its reply."""
        found = service()
        if found is None:
            self.problem(404, "not_set_up", "This server was not started by a hub with the service upperdeck.")
            return
        url, token = found
        headers = {"Authorization": f"token {token}", "Accept": "text/event-stream" if stream else "application/json"}
        for name in ("Content-Type", "Idempotency-Key", "Last-Event-ID"):
            if name in self.request.headers:
                headers[name] = self.request.headers[name]
        request = HTTPRequest(
            url + where,
            method=method,
            headers=headers,
            body=body,
            allow_nonstandard_methods=True,
            follow_redirects=False,
            request_timeout=_STREAM_S if stream else _ANSWER_S,
            header_callback=self._header if stream else None,
            streaming_callback=self._chunk if stream else None,
        )
        try:
            reply = await self.client().fetch(request, raise_error=False)
        except iostream.StreamClosedError:
            return
        except (OSError, HTTPClientError) as error:
            self.problem(503, "unavailable", f"The hub's service cannot be reached: {error}")
            return
        if reply.code == 599:
            self.problem(503, "unavailable", f"The hub's service cannot be reached: {reply.error}")
            return
        self.set_status(reply.code)
        self.set_header("Content-Type", reply.headers.get("Content-Type", "application/json"))
        self.set_header("Cache-Control", "no-store")
        self.finish(None if stream or reply.code == 204 else reply.body)

    def _header(self, line: str) -> None:
        if line.startswith("HTTP/"):
            self.set_status(int(line.split()[1]))
        elif line.lower().startswith("content-type:"):
            self.set_header("Content-Type", line.partition(":")[2].strip())
            self.set_header("Cache-Control", "no-store")

    def _chunk(self, data: bytes) -> None:
        if self.gone:
            # This ends the request to the service, too.
            raise iostream.StreamClosedError
        self.write(data)
        self.flush()


class SessionHandler(ServiceHandler):
    """What is in this session."""

    @web.authenticated
    async def get(self) -> None:
        await self.forward("GET", "session?" + urlencode({"home": str(Path.home())}))


class ImagesHandler(ServiceHandler):
    """The user's saved images."""

    @web.authenticated
    async def get(self) -> None:
        await self.forward("GET", "session/images")


class SavesHandler(ServiceHandler):
    """Saves this session."""

    @web.authenticated
    async def post(self) -> None:
        if len(self.request.body) > _MAX_BODY:
            self.problem(413, "invalid", "The request is too large.")
            return
        await self.forward("POST", "session/saves", body=self.request.body)


class SaveHandler(ServiceHandler):
    """A save of this session."""

    @web.authenticated
    async def get(self, save: str) -> None:
        await self.forward("GET", f"session/saves/{save}")

    @web.authenticated
    async def delete(self, save: str) -> None:
        await self.forward("DELETE", f"session/saves/{save}")


class EventsHandler(ServiceHandler):
    """The events of a save of this session."""

    @web.authenticated
    async def get(self, save: str) -> None:
        await self.forward("GET", f"session/saves/{save}/events", stream=True)


def handlers(base_url: str) -> list[Any]:
    """Returns the handlers below `base_url`."""
    at = url_path_join(base_url, "upperdeck")
    return [
        (at + "/session", SessionHandler),
        (at + "/images", ImagesHandler),
        (at + "/saves", SavesHandler),
        (at + f"/saves/{_SAVE}", SaveHandler),
        (at + f"/saves/{_SAVE}/events", EventsHandler),
    ]
