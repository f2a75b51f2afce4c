"""Robots of Harbor for pulling, by a stand-in with the replies that a Harbor 2.15 was seen to give."""

import json
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlparse

import pytest
import yaml
from tornado import httpserver, netutil, web

from fake import image
from jupyterhub_upperdeck.images import _read
from jupyterhub_upperdeck.manager import Problem
from jupyterhub_upperdeck.pull import HarborRobots, PullSecrets, secret_key

SEEN = Path(__file__).resolve().parents[4] / "shared/harbor"

# What is used of Harbor's API, by its description: the parameters of requests, and the fields that are sent and read.
PARAMETERS = {
    ("GET", "/projects/{project_name_or_id}"): {"X-Is-Resource-Name"},
    ("GET", "/robots"): {"q", "page_size"},
    ("POST", "/robots"): {"robot"},
    ("DELETE", "/robots/{robot_id}"): set(),
}
SENT = {
    "RobotCreate": {
        "name": "string",
        "description": "string",
        "level": "string",
        "duration": "integer",
        "permissions": ["RobotPermission"],
    },
    "RobotPermission": {"kind": "string", "namespace": "string", "access": ["Access"]},
    "Access": {"resource": "string", "action": "string", "effect": "string"},
}
READ = {
    "Project": {"project_id": "integer"},
    "Robot": {"id": "integer", "name": "string"},
    "RobotCreated": {"name": "string", "secret": "string"},
    "Errors": {"errors": ["Error"]},
    "Error": {"message": "string"},
}
TYPES = {"string": str, "integer": int}
PROJECTS = {"alice": 7, "2026": 8}


class Harbor(web.Application):
    """Keeps robots of two projects."""

    def __init__(self) -> None:
        super().__init__([("/api/v2.0/(.*)", Calls)])
        self.robots: dict[int, dict[str, Any]] = {}
        self.asked: list[tuple[str, str, list[str]]] = []
        self.bodies: list[dict[str, Any]] = []
        self.page: str | None = None
        # Replies have nothing but what is read of them.
        self.bare = False
        # The rights of the robot that makes robots; `None`: it is a user.
        self.maker: list[dict[str, str]] | None = None


class Calls(web.RequestHandler):
    application: Harbor

    def prepare(self) -> None:
        named = [name for name in self.request.headers if name.startswith("X-")]
        self.application.asked.append((str(self.request.method), self.request.uri or "", named))
        if self.application.page is not None:
            self.finish(self.application.page)
            return
        # Basic, "robot$hub:secret".
        if self.request.headers.get("Authorization") != "Basic cm9ib3QkaHViOnNlY3JldA==":
            self.set_status(401)
            self.finish({"errors": [{"code": "UNAUTHORIZED", "message": "unauthorized"}]})

    def refuse(self, status: int, code: str, message: str) -> None:
        self.set_status(status)
        self.finish({"errors": [{"code": code, "message": message}]})

    def say(self, kind: str, *found: dict[str, Any]) -> list[dict[str, Any]]:
        """Returns objects of Harbor's description as they are sent."""
        if not self.application.bare:
            return list(found)
        return [{name: one[name] for name in READ[kind]} for one in found]

    def get(self, where: str) -> None:
        if where.startswith("projects/"):
            name = where.removeprefix("projects/")
            by_name = self.request.headers.get("X-Is-Resource-Name") == "true"
            if name.isdecimal() and not by_name:
                name = {str(number): name for name, number in PROJECTS.items()}.get(name, "")
            if name not in PROJECTS:
                self.refuse(403, "FORBIDDEN", "forbidden")
                return
            project = {
                "name": name,
                "project_id": PROJECTS[name],
                "owner_name": "admin",
                "metadata": {"public": "false"},
            }
            self.finish(self.say("Project", project)[0])
        else:
            level, project_id, name = self.get_query_argument("q").split(",")
            assert level == "Level=project"
            [project] = [name for name, number in PROJECTS.items() if project_id == f"ProjectID={number}"]
            # As it is kept: with the project's name, and without the prefix.
            kept = [one for one in self.application.robots.values() if one["permissions"][0]["namespace"] == project]
            wanted = name.removeprefix("name=")
            fuzzy = wanted.startswith("~")
            names = [(one, one["name"].removeprefix("robot$")) for one in kept]
            found = [one for one, name in names if (wanted[1:] in name if fuzzy else wanted == name)]
            self.finish(json.dumps(self.say("Robot", *found)))

    def post(self, where: str) -> None:
        robot = json.loads(self.request.body)
        self.application.bodies.append(robot)
        number = len(self.application.asked)
        [permission] = robot["permissions"]
        name = f"robot${permission['namespace']}+{robot['name']}"
        maker = self.application.maker
        if not re.fullmatch("[a-z0-9]+([._-][a-z0-9]+)*", robot["name"]):
            self.refuse(400, "BAD_REQUEST", "robot name is not in lower case or contains illegal characters")
        elif maker is not None and any(access not in maker for access in permission["access"]):
            self.refuse(403, "DENIED", "permission scope is invalid")
        elif name in [one["name"] for one in self.application.robots.values()]:
            self.refuse(409, "CONFLICT", "robot account already exists")
        else:
            self.application.robots[number] = {**robot, "id": number, "name": name}
            self.set_status(201)
            created = {
                "creation_time": "2026-11-29T17:29:45.371Z",
                "expires_at": 1,
                "id": number,
                "name": name,
                "secret": f"secret-{number}",
            }
            self.finish(self.say("RobotCreated", created)[0])

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


async def test_a_project_whose_name_is_a_number(harbor: tuple[Harbor, HarborRobots]) -> None:
    kept, robots = harbor
    saved = _read(image("2026", "work", "1"), shared=False)
    assert saved is not None
    await robots.make("2026-1", saved)
    await robots.make("2026-1", saved)
    assert [one["name"] for one in kept.robots.values()] == ["robot$2026+hub-2026-1"]


async def test_a_robot_that_makes_robots_has_their_rights_itself(harbor: tuple[Harbor, HarborRobots]) -> None:
    kept, robots = harbor
    saved = _read(image("alice", "work", "1"), shared=False)
    assert saved is not None
    pull = {"resource": "repository", "action": "pull"}
    for right in (pull, {**pull, "effect": "allow"}):
        kept.maker = [right]
        await robots.make("alice-1", saved)
        [robot] = kept.robots.values()
        assert robot["permissions"][0]["access"] == [right]
    kept.maker = []
    with pytest.raises(Problem, match=r"made no robot for alice: HTTP status 403 \(permission scope is invalid\)"):
        await robots.make("alice-1", saved)


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


def test_keys_of_servers_differ_and_can_name_robots() -> None:
    servers = [
        ("alice", ""), ("alice", "x"), ("Alice", ""), ("alice/x", ""), ("a", "lice"), ("한글", ""),
        ("bob@example.org", ""), ("a__b", ""), ("a.-b", ""), ("a" * 23 + "@b", ""),
    ]  # fmt: skip
    keys = {secret_key(user, name) for user, name in servers}
    assert len(keys) == len(servers)
    assert all(len(f"upperdeck-pull-{key}") <= 63 for key in keys)
    assert all(re.fullmatch("[a-z0-9]+([._-][a-z0-9]+)*", key) for key in keys), keys


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


def check(value: Any, kind: str | list[str]) -> None:
    """Fails unless what is sent has only the fields of `SENT`, with their types."""
    if isinstance(kind, list):
        for one in value:
            check(one, kind[0])
    elif kind in SENT:
        assert set(value) <= set(SENT[kind]), (value, kind)
        for name in value:
            check(value[name], SENT[kind][name])
    else:
        assert type(value) is TYPES[kind], (value, kind)


async def test_no_more_is_used_of_harbor_than_is_listed_here(harbor: tuple[Harbor, HarborRobots]) -> None:
    kept, robots = harbor
    kept.bare = True
    saved, other = (_read(image(user, "work", "1"), shared=False) for user in ("alice", "erin"))
    assert saved is not None and other is not None
    await robots.make("alice-1", saved)
    await robots.make("alice-1", saved)
    with pytest.raises(Problem, match=r"403 \(forbidden\)"):
        await robots.make("x", other)
    used = set()
    for method, uri, headers in kept.asked:
        asked = urlparse(uri)
        path = asked.path.removeprefix("/api/v2.0")
        [described] = [
            one for one in PARAMETERS if one[0] == method and re.fullmatch(re.sub(r"{[^}]*}", "[^/]+", one[1]), path)
        ]
        assert set(parse_qs(asked.query)) <= PARAMETERS[described], uri
        # What is no parameter of a request is without effect.
        assert PARAMETERS[described] - {"robot"} <= set(parse_qs(asked.query)) | set(headers), uri
        used.add(described)
    assert used == set(PARAMETERS)
    for body in kept.bodies:
        check(body, "RobotCreate")


def test_harbor_describes_what_is_listed_here(seen: list[dict[str, Any]]) -> None:
    described = yaml.safe_load((SEEN / "swagger-v2.0.yaml").read_text())
    assert described["basePath"] == "/api/v2.0"
    for (method, path), parameters in PARAMETERS.items():
        given = described["paths"][path][method.lower()]["parameters"]
        given = [described["parameters"][one["$ref"].rpartition("/")[2]] if "$ref" in one else one for one in given]
        assert parameters <= {one["name"] for one in given}, (method, path)
    for kind, fields in {**SENT, **READ}.items():
        properties = described["definitions"][kind]["properties"]
        for name, type_ in fields.items():
            if isinstance(type_, list):
                assert properties[name]["type"] == "array"
                assert properties[name]["items"]["$ref"] == f"#/definitions/{type_[0]}", (kind, name)
            else:
                assert properties[name]["type"] == type_, (kind, name)
    # The right is among those that a robot was given.
    recorded = [one["request"] for one in seen if one["request"]["url"].endswith("/api/v2.0/robots")]
    known = [
        access
        for request in recorded
        for permission in json.loads(request["body"])["permissions"]
        for access in permission["access"]
    ]
    assert {"resource": "repository", "action": "pull"} in known
