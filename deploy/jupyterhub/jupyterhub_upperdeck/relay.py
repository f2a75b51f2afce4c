"""Passes a request to the manager, and its response back as it comes."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from typing import Any

from tornado import iostream, web

from .manager import Manager, Problem

_SHOWN = {
    "content-type",
    "cache-control",
    "content-language",
    "content-security-policy",
    "date",
    "etag",
    "link",
    "retry-after",
    "referrer-policy",
    "vary",
    "x-content-type-options",
    "x-frame-options",
}
_SENT = (
    "Accept",
    "Accept-Language",
    "Content-Type",
    "Idempotency-Key",
    "If-Match",
    "If-None-Match",
    "Last-Event-ID",
)
_STREAM_S = 24 * 3600.0
_ANSWER_S = 60.0
_STREAMS_PER_USER = 16
_streams: dict[str, int] = {}
_CODES = {401: "unauthenticated", 403: "not_permitted", 404: "not_found", 429: "too_many", 503: "unavailable"}


class ProblemHandler(web.RequestHandler):
    """Answers errors as problems (RFC 9457), as the manager does."""

    gone = False

    def on_connection_close(self) -> None:
        super().on_connection_close()
        self.gone = True

    def set_default_headers(self) -> None:
        self.clear_header("Server")
        self.set_header("X-Content-Type-Options", "nosniff")

    def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
        # A refusal is no defect of this program, and a notebook can have as many of them as it wants.
        if isinstance(value, Problem):
            logging.getLogger("jupyterhub_upperdeck").info("%s %s: %s", self.request.method, self.request.path, value)
        else:
            super().log_exception(typ, value, tb)

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        error = (kwargs.get("exc_info") or (None, None))[1]
        detail = self._reason
        if isinstance(error, Problem):
            self.write_problem(error)
            return
        if isinstance(error, web.HTTPError) and error.log_message and status_code < 500:
            detail = error.log_message
        self.refuse(status_code, detail)

    def refuse(self, status: int, detail: str, code: str | None = None) -> None:
        """Ends the response with a problem."""
        known = "unavailable" if status >= 500 else "invalid"
        body = {
            "status": status,
            "code": code or _CODES.get(status, known),
            "detail": detail,
            "retryable": status >= 500 or status == 429,
        }
        self.write_problem(Problem(status, body))

    def write_problem(self, problem: Problem) -> None:
        """Ends the response with a problem of the manager."""
        self.set_status(problem.status)
        self.set_header("Content-Type", "application/problem+json")
        self.finish(json.dumps({"status": problem.status, **problem.body}))


class _Response:
    """The manager's response on its way to the client."""

    def __init__(self, handler: ProblemHandler) -> None:
        self.handler = handler
        self.status: int | None = None
        self.begun = False

    def header(self, line: str) -> None:
        line = line.strip()
        if line.startswith("HTTP/"):
            self.status = int(line.split()[1])
            return
        name, colon, value = line.partition(":")
        if colon and name.lower() in _SHOWN:
            self.handler.set_header(name, value.strip())

    def begin(self) -> None:
        if not self.begun and self.status is not None:
            self.begun = True
            self.handler.set_status(self.status)

    def chunk(self, data: bytes) -> None:
        self.begin()
        if self.handler.gone:
            # This ends the request to the manager, too.
            raise iostream.StreamClosedError
        self.handler.write(data)
        self.handler.flush()


async def relay(
    handler: ProblemHandler,
    manager: Manager,
    target: str,
    token: str | None,
    who: str | None,
    body: bytes | None,
) -> None:
    """Sends a request to the manager with a token, and ends the response with the manager's.

    `who`: the user, whose number of event streams is limited.
    """
    stream = "text/event-stream" in handler.request.headers.get("Accept", "")
    sent = {name: handler.request.headers[name] for name in _SENT if name in handler.request.headers}
    response = _Response(handler)
    with _place(who if stream else None) as free:
        if not free:
            handler.refuse(429, "Too many event streams of one user are open.")
            return
        try:
            found = await manager.fetch(
                str(handler.request.method),
                target,
                token,
                body=body,
                headers=sent,
                streaming=response.chunk,
                on_header=response.header,
                timeout=_STREAM_S if stream else _ANSWER_S,
            )
        except Problem as problem:
            if not response.begun:
                handler.write_problem(problem)
            return
        except iostream.StreamClosedError:
            return
    if found.code == 599 and not response.begun:
        handler.write_problem(Problem.unavailable("the image manager cannot be reached"))
        return
    response.begin()
    with contextlib.suppress(iostream.StreamClosedError):
        handler.finish()


@contextlib.contextmanager
def _place(who: str | None) -> Iterator[bool]:
    """Takes one of a user's places for event streams; gives whether there was one."""
    if who is None:
        yield True
        return
    if _streams.get(who, 0) >= _STREAMS_PER_USER:
        yield False
        return
    _streams[who] = _streams.get(who, 0) + 1
    try:
        yield True
    finally:
        _streams[who] -= 1
        if _streams[who] == 0:
            del _streams[who]
