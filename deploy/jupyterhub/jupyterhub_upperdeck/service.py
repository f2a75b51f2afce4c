"""The hub's service: the portal behind the hub's sign-in, and requests of servers for their own session."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import secrets
import signal
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlparse

from jupyterhub import __version__ as hub_version
from jupyterhub.services.auth import HubOAuth, HubOAuthCallbackHandler
from tornado import httpserver, web

from .manager import Manager
from .portal import PortalHandler
from .relay import ProblemHandler
from .session import EventsHandler, ImagesHandler, SaveHandler, SavesHandler, SessionHandler

log = logging.getLogger("jupyterhub_upperdeck")

MAX_BODY = 1 << 20
_SAVE = r"([0-9a-f-]{36})"


class HealthHandler(ProblemHandler):
    """Says that the process responds."""

    def get(self) -> None:
        self.finish({"ready": True})


class CallbackHandler(ProblemHandler, HubOAuthCallbackHandler):
    """The end of a sign-in at the hub."""

    @property
    def hub_auth(self) -> Any:
        return self.settings["hub_auth"]


def application(manager: Manager, auth: HubOAuth, prefix: str, hub_prefix: str) -> web.Application:
    """Returns the service below `prefix`, e.g. ``/services/upperdeck/``."""
    own = prefix + "session"
    return web.Application(
        [
            (prefix + "oauth_callback", CallbackHandler),
            (prefix + "health", HealthHandler),
            (own, SessionHandler),
            (own + "/saves", SavesHandler),
            (own + "/images", ImagesHandler),
            (own + f"/saves/{_SAVE}", SaveHandler),
            (own + f"/saves/{_SAVE}/events", EventsHandler),
            (prefix + "(.*)", PortalHandler),
        ],
        manager=manager,
        hub_auth=auth,
        hub_version=hub_version,
        prefix=prefix,
        hub_prefix=hub_prefix,
        # Of this process alone: after a restart, browsers sign in again by way of the hub, without a form.
        cookie_secret=secrets.token_bytes(32),
        # HubOAuth checks its token against forged requests whenever it reads the cookie; a request with a token in its
        # header needs none, and Tornado's own check would refuse it.
        xsrf_cookies=False,
        compress_response=False,
    )


def place(url: str, listen: str | None) -> tuple[str, int]:
    """Returns address and port to listen at: `listen`, or those of the URL that the hub has for the service."""
    if listen:
        host, _, port = listen.rpartition(":")
        return host.strip("[]") or "0.0.0.0", int(port)  # noqa: S104 - the administrator's choice
    parsed = urlparse(url)
    host = parsed.hostname or "127.0.0.1"
    try:
        ipaddress.ip_address(host)
    except ValueError:
        # The name of a Kubernetes Service, whose address is not this process's.
        host = "127.0.0.1" if host == "localhost" else "0.0.0.0"  # noqa: S104
    return host, parsed.port or 80


async def serve(manager: Manager, listen: str | None, environment: Mapping[str, str] = os.environ) -> None:
    """Runs the service until SIGTERM or SIGINT."""
    prefix = environment["JUPYTERHUB_SERVICE_PREFIX"]
    hub_prefix = environment.get("JUPYTERHUB_BASE_URL", "/").rstrip("/") + "/hub/"
    # A minute: a user whom the hub no longer permits is refused that much later at most.
    auth = HubOAuth.instance(cache_max_age=60)
    server = httpserver.HTTPServer(
        application(manager, auth, prefix, hub_prefix), max_body_size=MAX_BODY, max_buffer_size=2 * MAX_BODY
    )
    address, port = place(environment.get("JUPYTERHUB_SERVICE_URL", ""), listen)
    server.listen(port, address)
    log.info("the service is ready at %s:%d%s, the manager is at %s", address, port, prefix, manager.url)
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    await ended.wait()
    server.stop()
