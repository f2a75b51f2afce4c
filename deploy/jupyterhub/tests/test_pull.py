"""Robots of Harbor for pulling, by a stand-in with the replies that a Harbor 2.15 was seen to give."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tornado import httpserver, netutil, web

from fake import image
from jupyterhub_upperdeck.images import _read
from jupyterhub_upperdeck.manager import Problem
from jupyterhub_upperdeck.pull import HarborRobots, secret_key


class Harbor(web.Application):
    """Keeps robots of one project."""

    def __init__(self) -> None:
        super().__init__([("/api/v2.0/(.*)", Calls)])
        self.robots: dict[int, dict[str, Any]] = {}
        self.asked: list[tuple[str, str]] = []


class Calls(web.RequestHandler):
    application: Harbor

    def prepare(self) -> None:
        self.application.asked.append((str(self.request.method), self.request.uri or ""))
        # Basic, "robot$hub:secret".
        if self.request.headers.get("Authorization") != "Basic cm9ib3QkaHViOnNlY3JldA==":
            self.set_status(401)
            self.finish({"errors": [{"code": "UNAUTHORIZED", "message": "unauthorized"}]})

    def get(self, where: str) -> None:
        if where.startswith("projects/"):
            self.set_status(200 if where == "projects/alice" else 404)
            self.finish({"project_id": 7})
            return
        self.finish(json.dumps(list(self.application.robots.values())))

    def post(self, where: str) -> None:
        robot = json.loads(self.request.body)
        number = len(self.application.asked)
        [permission] = robot["permissions"]
        name = f"robot${permission['namespace']}+{robot['name']}"
        self.application.robots[number] = {**robot, "id": number, "name": name}
        self.set_status(201)
        self.finish({"id": number, "name": name, "secret": f"secret-{number}", "expires_at": 1})

    def delete(self, where: str) -> None:
        del self.application.robots[int(where.removeprefix("robots/"))]


@pytest.fixture
async def harbor(tmp_path: Path) -> AsyncIterator[tuple[Harbor, HarborRobots]]:
    sockets = netutil.bind_sockets(0, "127.0.0.1")
    application = Harbor()
    server = httpserver.HTTPServer(application)
    server.add_sockets(sockets)
    (tmp_path / "robot").write_text("robot$hub:secret\n")
    yield application, HarborRobots(f"http://127.0.0.1:{sockets[0].getsockname()[1]}", str(tmp_path / "robot"))
    server.stop()


async def test_a_robot_may_pull_from_one_project_for_a_day(harbor: tuple[Harbor, HarborRobots]) -> None:
    kept, robots = harbor
    saved = _read(image("alice", "work", "1"), shared=False)
    assert saved is not None
    name, password = await robots.make("alice-1", saved)
    [robot] = kept.robots.values()
    assert (name, robot["duration"], robot["level"]) == ("robot$alice+hub-alice-1", 1, "project")
    assert password.startswith("secret-")
    [permission] = robot["permissions"]
    assert permission == {
        "kind": "project",
        "namespace": "alice",
        "access": [{"resource": "repository", "action": "pull"}],
    }
    # The next start of the same server replaces it; another server's stays.
    await robots.make("alice-2", saved)
    await robots.make("alice-1", saved)
    assert sorted(one["name"] for one in kept.robots.values()) == ["robot$alice+hub-alice-1", "robot$alice+hub-alice-2"]


async def test_what_harbor_refuses_is_said(harbor: tuple[Harbor, HarborRobots], tmp_path: Path) -> None:
    _, robots = harbor
    other = _read(image("erin", "work", "1"), shared=False)
    assert other is not None
    with pytest.raises(Problem, match="does not show the project erin"):
        await robots.make("x", other)
    (tmp_path / "robot").write_text("robot$hub:wrong\n")
    with pytest.raises(Problem, match="401"):
        await robots.make("x", other)


def test_keys_of_servers_differ() -> None:
    servers = [("alice", ""), ("alice", "x"), ("Alice", ""), ("alice/x", ""), ("a", "lice"), ("한글", "")]
    keys = {secret_key(user, name) for user, name in servers}
    assert len(keys) == len(servers)
    assert all(len(f"upperdeck-pull-{key}") <= 63 for key in keys)
