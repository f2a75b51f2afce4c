"""Requests of a server for its own session, with its own token: what is in it, save it, follow that save.

The token says which server it is of, and the hub which container that is. No part of a request does.
"""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

from .hub import Server, running_server, server_of
from .images import saved_images
from .manager import Json, Manager, Problem, path
from .relay import ProblemHandler, relay
from .starting import judge_session

_MAX_IMAGES = 100
_FIELDS = {"name", "tag", "message", "replace"}


class OwnSession(ProblemHandler):
    """Finds out which server a request is from."""

    server: Server

    @property
    def manager(self) -> Manager:
        found: Manager = self.settings["manager"]
        return found

    async def prepare(self) -> None:
        auth = self.settings["hub_auth"]
        header = self.request.headers.get("Authorization", "")
        kind, _, token = header.partition(" ")
        if kind.lower() not in ("token", "bearer") or not token.strip():
            self.refuse(401, "Send the server's own token: Authorization: token $JUPYTERHUB_API_TOKEN")
            return
        model = await auth.user_for_token(token.strip(), use_cache=False, sync=False)
        if not isinstance(model, dict) or model.get("kind") != "user":
            self.refuse(401, "The hub does not know this token.")
            return
        if not auth.check_scopes(auth.access_scopes, model):
            self.refuse(403, "The token may not use this service: Spawner.server_token_scopes lacks its access scope.")
            return
        name = server_of(model)
        if name is None:
            self.refuse(403, "This is not the token of one server of its user.")
            return
        server = await running_server(auth, model["name"], name)
        if server is None or server.session is None:
            self.refuse(404, "The hub knows no running session of this server.")
            return
        self.server = server

    async def call(self, method: str, where: str, **more: Any) -> Json:
        return await self.manager.call(method, where, self.server.owner, **more)

    async def own_save(self, save: str) -> Json:
        """Returns a save of this session. Fails with 404 for any other."""
        session = await self.manager.session(self.server.owner, self.server.session or "")
        found = await self.call("GET", path("saves", save))
        if session is None or found.get("session") != session.get("id"):
            raise Problem(404, {"code": "not_found", "detail": "This session has no such save."})
        return found

    def reply(self, body: Json, status: int = 200) -> None:
        self.set_status(status)
        self.set_header("Cache-Control", "no-store")
        self.finish(body)


class SessionHandler(OwnSession):
    """What is in the session and what of it a save would contain."""

    async def get(self) -> None:
        session = await self.manager.session(self.server.owner, self.server.session or "")
        if session is None:
            raise Problem(
                404,
                {
                    "code": "not_found",
                    "detail": "The image manager does not know this session (yet). A new one appears within seconds.",
                    "retryable": True,
                },
            )
        try:
            packages: Json | None = await self.call("GET", path("sessions", str(session["id"]), "packages"))
        except Problem:
            packages = None
        if self.server.image_name:
            session = {**session, "suggested_name": self.server.image_name}
        latest = await self.call("GET", path("saves"), query={"session": str(session["id"]), "limit": 1})
        home = self.get_query_argument("home", "")
        judged = judge_session(session, packages, hub_version=self.settings["hub_version"], home=home[:4096] or None)
        self.reply(
            {
                "user": self.server.user,
                "owner": self.server.owner,
                "server": self.server.name,
                "session": session,
                "packages": packages,
                "start": judged.as_json(),
                "save": next(iter(latest.get("saves", [])), None),
                "spawn": spawn_page(self.settings["hub_prefix"], self.server),
                "portal": self.settings["prefix"],
            }
        )


def spawn_page(hub_prefix: str, server: Server) -> str:
    """Returns the path of the page on which a server is started."""
    parts = (server.user, server.name) if server.name else (server.user,)
    return f"{hub_prefix}spawn/" + "/".join(quote(part, safe="@") for part in parts)


class SavesHandler(OwnSession):
    """Saves the session."""

    async def post(self) -> None:
        try:
            given = json.loads(self.request.body or b"{}")
        except (ValueError, RecursionError):
            given = None
        if not isinstance(given, dict) or set(given) - _FIELDS:
            self.refuse(422, f"The body is a JSON object with some of {', '.join(sorted(_FIELDS))}.")
            return
        image = {name: given[name] for name in ("name", "tag") if given.get(name)}
        body: Json = {"session": self.server.session, "image": image}
        body |= {name: given[name] for name in ("message", "replace") if given.get(name)}
        save = await self.call("POST", path("saves"), body=body, key=self.request.headers.get("Idempotency-Key"))
        self.set_header("Location", f"{self.settings['prefix']}session/saves/{save['id']}")
        self.reply(save, 202)


class SaveHandler(OwnSession):
    """A save of the session: its state, or its end."""

    async def get(self, save: str) -> None:
        self.reply(await self.own_save(save))

    async def delete(self, save: str) -> None:
        await self.own_save(save)
        self.reply(await self.call("DELETE", path("saves", save)))


class EventsHandler(OwnSession):
    """The events of a save of the session."""

    async def get(self, save: str) -> None:
        await self.own_save(save)
        token = self.manager.signer.token(self.server.owner)
        self.request.headers["Accept"] = "text/event-stream"
        await relay(self, self.manager, path("saves", save, "events"), token, self.server.user, None)


class ImagesHandler(OwnSession):
    """The user's saved images, the newest first, to read."""

    async def get(self) -> None:
        images = await saved_images(self.manager, self.server.owner, most=_MAX_IMAGES)
        self.reply(
            {
                "images": [
                    {
                        "key": image.key,
                        "name": image.name,
                        "tags": list(image.tags),
                        "reference": image.reference,
                        "changed": image.changed,
                        "bytes": image.bytes,
                        "gpu": image.gpu,
                        "message": image.message,
                        "shared": image.shared,
                        "owner": image.owner,
                    }
                    for image in images
                ]
            }
        )
