"""The portal's page and its calls, behind the hub's sign-in."""

from __future__ import annotations

import re
from typing import Any

from jupyterhub.services.auth import HubOAuthenticated

from .hub import has_server_scope
from .manager import Manager
from .owner import owner_of
from .relay import ProblemHandler, relay

# Parts of the page, and the documentation of the API: the same for all, so that they need no sign-in.
_PUBLIC = re.compile(
    r"(?:[a-z0-9_-]+/)*[A-Za-z0-9_.-]+\.(?:js|css|svg|png|ico|webmanifest)|docs(?:/[a-z]+)?|openapi\.json|version"
)
# The hub signs in and out; the manager's own ways would make a second identity beside it.
_SIGN_IN = re.compile(r"api/v1/signin(?:/.*)?")


class PortalHandler(HubOAuthenticated, ProblemHandler):
    """Passes the page and its calls to the manager, as the user whom the hub names."""

    @property
    def hub_auth(self) -> Any:
        return self.settings["hub_auth"]

    @property
    def manager(self) -> Manager:
        found: Manager = self.settings["manager"]
        return found

    async def get(self, where: str) -> None:
        if where == "":
            await self._page()
        elif where.startswith("api/"):
            await self._api(where)
        elif _PUBLIC.fullmatch(where):
            await relay(self, self.manager, f"/{where}", None, None, None)
        else:
            self.refuse(404, "There is no such page.")

    async def post(self, where: str) -> None:
        await self._change(where)

    async def patch(self, where: str) -> None:
        await self._change(where)

    async def delete(self, where: str) -> None:
        await self._change(where)

    async def _change(self, where: str) -> None:
        if where.startswith("api/"):
            await self._api(where)
        else:
            self.refuse(404, "There is no such page.")

    async def _page(self) -> None:
        if self.current_user is None:
            self.redirect(self.get_login_url())
            return
        # Sets the cookie with the token against forged requests, which the page's script sends back.
        _ = self.xsrf_token
        await relay(self, self.manager, "/", None, None, None)

    async def _api(self, where: str) -> None:
        if _SIGN_IN.fullmatch(where):
            self.refuse(404, "The hub signs users in and out.")
            return
        user = self.current_user
        if user is None:
            self.refuse(401, "The hub does not know the user of this request, or it may not use this service.")
            return
        if getattr(self, "_token_authenticated", False) and has_server_scope(user):
            self.refuse(403, "A server's own token is for the addresses below session/, and for no others.")
            return
        query = f"?{self.request.query}" if self.request.query else ""
        body = self.request.body if self.request.method in ("POST", "PATCH") else None
        token = self.manager.signer.token(owner_of(user["name"]), groups=user.get("groups") or [])
        await relay(self, self.manager, f"/{where}{query}", token, user["name"], body)
