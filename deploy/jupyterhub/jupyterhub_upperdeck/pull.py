"""Credentials with which a cluster's nodes pull a saved image from a private project of Harbor."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlencode

from tornado.httpclient import AsyncHTTPClient, HTTPClientError, HTTPRequest, HTTPResponse

from .images import SavedImage
from .manager import Problem, client
from .owner import owner_of
from .text import shorten

LABELS = {"app.kubernetes.io/managed-by": "jupyterhub-upperdeck", "component": "upperdeck-pull"}


class Credentials(Protocol):
    """Makes a credential that can pull an image and nothing else that matters."""

    async def make(self, key: str, image: SavedImage) -> tuple[str, str]:
        """Returns user and password; those made before under `key` need not be valid any more."""
        ...


class HarborRobots:
    """Robot accounts of Harbor: one for each server of a user, with the right to pull from one project, for a day.

    Harbor gives rights by project. With a project for each user (``--target HOST/{user}/{name}:{tag}``), such a robot
    can pull the images of one user. It is in a Secret that only the kubelet reads: no server gets it.
    """

    def __init__(self, url: str, credentials_file: str, days: int = 1) -> None:
        """`url` is Harbor's, e.g. ``https://harbor.example.org``; `credentials_file` has ``USER:PASSWORD`` of an
        account that may make robots. `days` is how long a robot is valid, at least 1."""
        if days < 1:
            raise ValueError("a robot is valid for at least one day")
        self.url = url.rstrip("/")
        self.days = days
        self._file = Path(credentials_file)
        self._client: AsyncHTTPClient | None = None

    async def _call(self, method: str, target: str, body: dict[str, Any] | None = None) -> HTTPResponse:
        if self._client is None:
            self._client = client()
        try:
            user, _, password = self._file.read_text().strip().partition(":")
        except OSError as error:
            raise Problem.unavailable(f"the account that makes robots cannot be read: {error}") from error
        request = HTTPRequest(
            f"{self.url}/api/v2.0/{target}",
            method=method,
            auth_username=user,
            auth_password=password,
            # A project whose name is a number would be taken for the one with that ID.
            headers={"Content-Type": "application/json", "X-Is-Resource-Name": "true"},
            body=json.dumps(body) if body is not None else None,
        )
        try:
            return await self._client.fetch(request, raise_error=False)
        except (OSError, HTTPClientError) as error:
            raise Problem.unavailable(f"Harbor cannot be reached: {error}") from error

    async def make(self, key: str, image: SavedImage) -> tuple[str, str]:
        project = image.repository.split("/")[1]
        name = f"hub-{key}"
        await self._remove(name, project)
        # A robot that makes robots has to have their rights itself. Harbor compares them as they were written, with the
        # effect "allow" or with none, which means the same.
        for effect in ({}, {"effect": "allow"}):
            response = await self._call("POST", "robots", self._robot(name, project, effect))
            if response.code != 403:
                break
        if response.code != 201:
            raise Problem.unavailable(f"Harbor made no robot for {project}: {_refusal(response)}")
        made = json.loads(response.body)
        return str(made["name"]), str(made["secret"])

    def _robot(self, name: str, project: str, effect: dict[str, str]) -> dict[str, Any]:
        return {
            "name": name,
            "description": "Pulls a saved image for a server of JupyterHub",
            "level": "project",
            "duration": self.days,
            "permissions": [
                {
                    "kind": "project",
                    "namespace": project,
                    "access": [{"resource": "repository", "action": "pull", **effect}],
                }
            ],
        }

    async def _remove(self, name: str, project: str) -> None:
        """Removes the robot that an earlier start of the same server made."""
        found = await self._call("GET", f"projects/{project}")
        if found.code != 200:
            raise Problem.unavailable(f"Harbor does not show the project {project}: {_refusal(found)}")
        number = int(json.loads(found.body)["project_id"])
        # Not an exact match, because Harbor keeps the name with that of the project before it.
        query = urlencode({"q": f"Level=project,ProjectID={number},name=~{name}", "page_size": 100})
        listed = await self._call("GET", f"robots?{query}")
        if listed.code != 200:
            raise Problem.unavailable(f"Harbor does not list the robots of {project}: {_refusal(listed)}")
        for robot in json.loads(listed.body):
            if str(robot.get("name", "")).endswith(f"+{name}"):
                await self._call("DELETE", f"robots/{int(robot['id'])}")


def _refusal(response: HTTPResponse) -> str:
    """Returns the status of a reply, with the reason that Harbor gives."""
    status = f"HTTP status {response.code}"
    try:
        reason = shorten(json.loads(response.body)["errors"][0]["message"], 200)
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        return status
    return f"{status} ({reason})" if reason else status


class PullSecrets:
    """Writes credentials as Secrets of Kubernetes, one for each server of a user."""

    def __init__(self, credentials: Credentials) -> None:
        self.credentials = credentials

    async def ensure(self, spawner: Any, image: SavedImage) -> str:
        """Makes the credential and writes the Secret into the server's namespace. Returns the Secret's name.

        Fails with :class:`Problem`.
        """
        key = secret_key(spawner.user.name, spawner.name)
        try:
            user, password = await self.credentials.make(key, image)
        except (ValueError, KeyError, TypeError) as error:
            # A reply that is none of Harbor's, e.g. of a proxy before it.
            raise Problem.unavailable(f"no credential can be made: {type(error).__name__}: {error}") from error
        name = _secret_name(key)
        await write_secret(spawner, secret(name, image.repository.split("/")[0], user, password))
        return name

    async def remove(self, spawner: Any) -> None:
        """Deletes the Secret of a server that has stopped, if there is one. The credential expires by itself.

        Fails with :class:`Problem`.
        """
        name = _secret_name(secret_key(spawner.user.name, spawner.name))
        try:
            await _delete_secret(spawner, name)
        except Exception as error:
            raise Problem.unavailable(f"the Secret {name} cannot be deleted: {error}") from error


def _secret_name(key: str) -> str:
    return f"upperdeck-pull-{key}"


def secret_key(user: str, server: str) -> str:
    """Returns the name of a server that no other server of any user has.

    Kubernetes takes it as a part of a Secret's name, and Harbor as one of a robot's: in these, letters and digits are
    separated by one character.
    """
    digest = hashlib.sha256(f"{user}\xff{server}".encode()).hexdigest()[:16]
    stem = re.sub(r"[^a-z0-9]+", "-", owner_of(user))[:24].strip("-")
    return f"{stem}-{digest}"


def secret(name: str, host: str, user: str, password: str) -> dict[str, Any]:
    """Returns a Secret of the type that a pod's ``imagePullSecrets`` names."""
    auth = base64.b64encode(f"{user}:{password}".encode()).decode()
    config = {"auths": {host: {"username": user, "password": password, "auth": auth}}}
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": "kubernetes.io/dockerconfigjson",
        "metadata": {"name": name, "labels": LABELS},
        "data": {".dockerconfigjson": base64.b64encode(json.dumps(config).encode()).decode()},
    }


async def write_secret(spawner: Any, body: dict[str, Any]) -> None:
    """Creates the Secret, in place of the one of an earlier start.

    The hub's role in zero-to-jupyterhub may create and delete Secrets, and not update them.
    """
    name, namespace = body["metadata"]["name"], spawner.namespace
    try:
        try:
            await spawner.api.create_namespaced_secret(namespace, body)
        except Exception as error:
            if getattr(error, "status", None) != 409:
                raise
            await _delete_secret(spawner, name)
            await spawner.api.create_namespaced_secret(namespace, body)
    except Exception as error:
        raise Problem.unavailable(f"the Secret {name} cannot be written: {error}") from error


async def _delete_secret(spawner: Any, name: str) -> None:
    """Deletes a Secret in the server's namespace, if it is there."""
    try:
        await spawner.api.delete_namespaced_secret(name, spawner.namespace)
    except Exception as error:
        if getattr(error, "status", None) != 404:
            raise
