"""Robots of Harbor for pulling, by a stand-in with the replies that a Harbor 2.15 was seen to give."""

import json
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlparse

import jsonschema
import pytest
import yaml
from tornado import httpserver, netutil, web

from fake import image
from jupyterhub_upperdeck.images import _read
from jupyterhub_upperdeck.manager import Problem
from jupyterhub_upperdeck.pull import HarborRobots, PullSecrets, secret_key

SEEN = Path(__file__).resolve().parents[4] / "shared/harbor"


class Harbor(web.Application):
    """Keeps robots of one project."""

    def __init__(self) -> None:
        super().__init__([("/api/v2.0/(.*)", Calls)])
        self.robots: dict[int, dict[str, Any]] = {}
        self.asked: list[tuple[str, str]] = []
        self.bodies: list[dict[str, Any]] = []
        self.page: str | None = None


class Calls(web.RequestHandler):
    application: Harbor

    def prepare(self) -> None:
        self.application.asked.append((str(self.request.method), self.request.uri or ""))
        if self.application.page is not None:
            self.finish(self.application.page)
            return
        # Basic, "robot$hub:secret".
        if self.request.headers.get("Authorization") != "Basic cm9ib3QkaHViOnNlY3JldA==":
            self.set_status(401)
            self.finish({"errors": [{"code": "UNAUTHORIZED", "message": "unauthorized"}]})

    def get(self, where: str) -> None:
        if where == "projects/alice":
            self.finish({"name": "alice", "project_id": 7, "owner_name": "admin", "metadata": {"public": "false"}})
        elif where.startswith("projects/"):
            self.set_status(403)
            self.finish({"errors": [{"code": "FORBIDDEN", "message": "forbidden"}]})
        else:
            level, project, name = self.get_query_argument("q").split(",")
            assert (level, project) == ("Level=project", "ProjectID=7")
            # As it is kept: with the project's name, and without the prefix.
            kept = self.application.robots.values()
            wanted = name.removeprefix("name=")
            fuzzy = wanted.startswith("~")
            names = [(one, one["name"].removeprefix("robot$")) for one in kept]
            found = [one for one, name in names if (wanted[1:] in name if fuzzy else wanted == name)]
            self.finish(json.dumps(found))

    def post(self, where: str) -> None:
        robot = json.loads(self.request.body)
        self.application.bodies.append(robot)
        number = len(self.application.asked)
        [permission] = robot["permissions"]
        name = f"robot${permission['namespace']}+{robot['name']}"
        if name in [one["name"] for one in self.application.robots.values()]:
            self.set_status(409)
            self.finish({"errors": [{"code": "CONFLICT", "message": "robot account already exists"}]})
            return
        self.application.robots[number] = {**robot, "id": number, "name": name}
        self.set_status(201)
        created = "2026-11-29T17:29:45.371Z"
        self.finish(
            {"creation_time": created, "expires_at": 1, "id": number, "name": name, "secret": f"secret-{number}"}
        )

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


async def test_what_is_no_reply_of_harbor_is_said(harbor: tuple[Harbor, HarborRobots], tmp_path: Path) -> None:
    kept, robots = harbor
    saved = _read(image("alice", "work", "1"), shared=False)
    assert saved is not None
    spawner = SimpleNamespace(user=SimpleNamespace(name="alice"), name="")
    kept.page = "<html>a proxy</html>"
    with pytest.raises(Problem, match="no credential can be made"):
        await PullSecrets(robots).ensure(spawner, saved)
    (tmp_path / "robot").unlink()
    with pytest.raises(Problem, match="cannot be read"):
        await PullSecrets(robots).ensure(spawner, saved)


def test_keys_of_servers_differ() -> None:
    servers = [("alice", ""), ("alice", "x"), ("Alice", ""), ("alice/x", ""), ("a", "lice"), ("한글", "")]
    keys = {secret_key(user, name) for user, name in servers}
    assert len(keys) == len(servers)
    assert all(len(f"upperdeck-pull-{key}") <= 63 for key in keys)


@pytest.fixture
def seen() -> list[dict[str, Any]]:
    if not SEEN.exists():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"what Harbor was seen to do is not at {SEEN}")
    lines = (SEEN / "observed-2.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def shape(value: Any) -> Any:
    """Returns the names and types of a reply, the names of its errors as they are."""
    if isinstance(value, dict):
        return {name: value[name] if name in ("code", "message") else shape(value[name]) for name in value}
    return [shape(one) for one in value] if isinstance(value, list) else type(value).__name__


async def test_the_stand_in_answers_as_harbor_was_seen_to(
    harbor: tuple[Harbor, HarborRobots], seen: list[dict[str, Any]]
) -> None:
    _, robots = harbor
    robot = {
        "name": "x",
        "permissions": [{"kind": "project", "namespace": "alice", "access": []}],
    }
    for method, ours, path, status in [
        ("GET", "projects/alice", r"/api/v2.0/projects/s01-robot", 200),
        ("GET", "projects/nosuch", r"/api/v2.0/projects/nosuch", 403),
        ("POST", "robots", r"/api/v2.0/robots", 201),
        ("DELETE", "robots/3", r"/api/v2.0/robots/\d+", 200),
    ]:
        [*recorded] = [
            one["response"] for one in seen
            if one["request"]["method"] == method and one["response"]["status"] == status
            and re.fullmatch(path, urlparse(one["request"]["url"]).path)
        ]  # fmt: skip
        assert recorded, (method, path)
        answer = await robots._call(method, ours, robot if method == "POST" else None)
        assert answer.code == status, (method, ours)
        theirs = [json.loads(one["body"] or "{}") for one in recorded]
        given = json.loads(answer.body or "{}")
        if status == 200 and given:
            # Of the project, the stand-in says what is used.
            assert all(shape(given).items() <= shape(one).items() for one in theirs)
        else:
            assert shape(given) in [shape(one) for one in theirs], (given, theirs)


async def test_the_requests_are_as_harbor_describes_them(
    harbor: tuple[Harbor, HarborRobots], seen: list[dict[str, Any]]
) -> None:
    kept, robots = harbor
    saved = _read(image("alice", "work", "1"), shared=False)
    assert saved is not None
    await robots.make("alice-1", saved)
    await robots.make("alice-1", saved)
    described = yaml.safe_load((SEEN / "swagger-v2.0.yaml").read_text())
    for method, uri in kept.asked:
        asked = urlparse(uri)
        paths = [
            path for path in described["paths"]
            if re.fullmatch(described["basePath"] + re.sub(r"{[^}]*}", "[^/]+", path), asked.path)
        ]  # fmt: skip
        assert len(paths) == 1, uri
        operation = described["paths"][paths[0]][method.lower()]
        parameters = [
            described["parameters"][one["$ref"].rpartition("/")[2]] if "$ref" in one else one
            for one in operation["parameters"]
        ]
        assert set(parse_qs(asked.query)) <= {one["name"] for one in parameters}, uri
    assert {method for method, _ in kept.asked} == {"GET", "POST", "DELETE"}
    # Names that are not described would be ignored.
    for name in ("RobotCreate", "RobotPermission", "Access"):
        described["definitions"][name]["additionalProperties"] = False
    for body in kept.bodies:
        jsonschema.validate(body, {"$ref": "#/definitions/RobotCreate", "definitions": described["definitions"]})
    # The rights are among those that a robot was given.
    recorded = [one["request"] for one in seen if one["request"]["url"].endswith("/api/v2.0/robots")]
    known = [
        access
        for request in recorded
        for permission in json.loads(request["body"])["permissions"]
        for access in permission["access"]
    ]
    assert all(access in known for body in kept.bodies for access in body["permissions"][0]["access"])
