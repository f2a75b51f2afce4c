"""What the hub's service asks of the hub: whose token a request has, and which container a server runs in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from jupyterhub.services.auth import HubAuth

from .manager import Json
from .owner import owner_of

_SERVER = "access:servers!server="


@dataclass(frozen=True)
class Server:
    """A running server of the hub.

    `session` is what the manager knows it by; `None`: the spawner does not say. `image_name` is the name of the saved
    image that it was started from.
    """

    user: str
    name: str
    session: str | Json | None
    image_name: str | None = None

    @property
    def owner(self) -> str:
        return owner_of(self.user)


def server_of(model: Json) -> str | None:
    """Returns the name of the server whose own token the hub describes in `model`; `None` for any other token.

    Such a token has access to exactly this server. A token that another user was given for it does not count: the
    server has to be one of the token's user.
    """
    user = model.get("name")
    names = {
        scope.removeprefix(_SERVER).partition("/")[2]
        for scope in model.get("scopes", [])
        if scope.startswith(f"{_SERVER}{user}/")
    }
    return names.pop() if len(names) == 1 else None


def has_server_scope(model: Json) -> bool:
    """Returns whether a token is restricted to some server, as servers' own tokens are."""
    return any(scope.startswith(_SERVER) for scope in model.get("scopes", []))


async def running_server(auth: HubAuth, user: str, name: str) -> Server | None:
    """Returns a server of a user if it runs, as the hub's record has it."""
    url = f"{auth.api_url}/users/{quote(user, safe='')}"
    model = await auth._api_request("GET", url, allow_403=False)
    servers: dict[str, Any] = (model or {}).get("servers") or {}
    server = servers.get(name)
    if not isinstance(server, dict) or not (server.get("ready") or server.get("pending") == "stop"):
        return None
    state = server.get("state") or {}
    kept = state.get("upperdeck")
    kept = kept if isinstance(kept, dict) else {}
    session = kept.get("session")
    if session is None and state.get("pod_name"):
        session = {
            "namespace": state.get("namespace"),
            "pod": state["pod_name"],
            "container": "notebook",
        }
    if session is None:
        session = state.get("object_id")
    return Server(user, name, session, kept.get("image_name"))
