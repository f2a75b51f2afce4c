"""A user of the hub, by way of HTTP."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import requests

from lab import PASSWORD, Lab, until


class Person:
    """A user who has logged in, as a browser would."""

    def __init__(self, lab: Lab, name: str) -> None:
        self.lab = lab
        self.name = name
        self.http = requests.Session()
        page = self.http.get(f"{lab.hub}/hub/login", timeout=60)
        assert page.ok
        given = {"username": name, "password": PASSWORD, "_xsrf": self.cookie("_xsrf", "/hub/")}
        entered = self.http.post(f"{lab.hub}/hub/login?next=%2Fhub%2Fhome", data=given, timeout=60)
        assert entered.url.endswith("/hub/home"), entered.url

    def cookie(self, name: str, path: str) -> str:
        found = {cookie.path: cookie.value for cookie in self.http.cookies if cookie.name == name}
        return str(found.get(path, ""))

    def api(self, method: str, where: str, **more: Any) -> requests.Response:
        """Calls the hub's API as the user's browser does."""
        headers = {"X-XSRFToken": self.cookie("_xsrf", "/hub/"), "Referer": f"{self.lab.hub}/hub/home"}
        return self.http.request(method, f"{self.lab.hub}/hub/api/{where}", headers=headers, timeout=60, **more)

    def server(self, name: str = "") -> str:
        return f"users/{quote(self.name)}/server" + (f"s/{name}" if name else "")

    def request_start(self, name: str = "", **options: Any) -> requests.Response:
        return self.api("POST", self.server(name), json=options)

    def ready(self, name: str = "") -> bool:
        model = self.api("GET", f"users/{quote(self.name)}").json()
        return bool(model["servers"].get(name, {}).get("ready"))

    def start(self, name: str = "", **options: Any) -> None:
        """Starts a server and waits until it is ready."""
        begun = self.request_start(name, **options)
        assert begun.status_code in (201, 202), begun.text
        until(f"the server of {self.name}", lambda: self.ready(name))

    def stopped(self, name: str = "") -> bool:
        model = self.api("GET", f"users/{quote(self.name)}").json()
        return name not in model["servers"]

    def stop(self, name: str = "") -> None:
        """Stops a server and waits until it has stopped."""
        done = self.api("DELETE", self.server(name))
        assert done.status_code in (202, 204), done.text
        until(f"the stop of {self.name}", lambda: self.stopped(name))

    def spawn_page(self, language: str = "en") -> str:
        page = self.http.get(f"{self.lab.hub}/hub/spawn", headers={"Accept-Language": language}, timeout=60)
        assert page.ok, page.status_code
        return page.content.decode()

    # --- the service

    def enter_portal(self) -> requests.Response:
        """Opens the service's page, by way of the hub's sign-in."""
        return self.http.get(f"{self.lab.hub}/services/upperdeck/", timeout=60)

    def portal(self, method: str, where: str, headers: dict[str, str] | None = None, **more: Any) -> requests.Response:
        """Makes a call of the portal's page."""
        given = {
            "X-XSRFToken": self.cookie("_xsrf", "/services/upperdeck/"),
            "Upperdeck-Request": "1",
            "Sec-Fetch-Mode": "cors",
            **(headers or {}),
        }
        url = f"{self.lab.hub}/services/upperdeck/{where}"
        return self.http.request(method, url, headers=given, timeout=60, **more)


class Session:
    """A user's running server, seen from within: its container and its own token."""

    def __init__(self, lab: Lab, owner: str, name: str = "") -> None:
        self.lab = lab
        for container in lab.engine("ps", "--quiet", "--no-trunc").split():
            words = lab.engine("inspect", "--format", "{{range .Config.Env}}{{println .}}{{end}}", container)
            environment = dict(line.split("=", 1) for line in words.splitlines() if "=" in line)
            if environment.get("JUPYTERHUB_USER") == owner and environment.get("JUPYTERHUB_SERVER_NAME") == name:
                self.container = container
                self.environment = environment
                return
        raise AssertionError(f"{owner} has no running server {name!r}")

    @property
    def token(self) -> str:
        return self.environment["JUPYTERHUB_API_TOKEN"]

    def shell(self, script: str) -> str:
        return self.lab.engine("exec", self.container, "/bin/bash", "-ec", script)

    def call(self, method: str, where: str = "session", token: str | None = None, **more: Any) -> requests.Response:
        """Makes a request to the service with the session's own token."""
        headers = {"Authorization": f"token {token or self.token}"}
        return requests.request(
            method, self.environment["UPPERDECK_SERVICE_URL"] + where, headers=headers, timeout=60, **more
        )

    def known(self) -> dict[str, Any]:
        """Waits until the manager knows the session, and returns what the service says of it."""

        def look() -> Any:
            found = self.call("GET")
            assert found.status_code in (200, 404), found.text
            return found.json() if found.ok else None

        found: dict[str, Any] = until("the manager knows the session", look)
        return found

    def save(self, **body: Any) -> dict[str, Any]:
        """Saves the session and waits for the end."""
        begun = self.call("POST", "session/saves", json=body)
        assert begun.status_code == 202, begun.text
        number = begun.json()["id"]

        def look() -> Any:
            found = self.call("GET", f"session/saves/{number}").json()
            return found if found["state"] in ("succeeded", "failed", "cancelled") else None

        found: dict[str, Any] = until("the end of the save", look)
        return found
