"""What KubeSpawner's own class makes of the profiles: pods, images, pull secrets, refusals."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jupyterhub.objects import Hub, Server
from kubespawner import KubeSpawner
from tornado import web
from traitlets.config import Config

from fake import FakeManager, image
from jupyterhub_upperdeck import owner_of, profile_list
from jupyterhub_upperdeck.kube import UpperdeckKubeSpawner
from jupyterhub_upperdeck.manager import Manager
from jupyterhub_upperdeck.pull import PullSecrets, secret_key
from jupyterhub_upperdeck.stopping import Outcome

USERS = [
    "alice",
    "Bob",
    "carol@example.com",
    "Ünal Öz",
    "d.e-f_g",
    "한글이름",
    "x" * 70,
    "../../etc",
    "{{ user }}",
    "-a--b-",
]
SITE = [{"display_name": "Base", "slug": "base", "kubespawner_override": {"image": "quay.io/base:1"}}]
OVERRIDES = {
    "cpu": {"cpu_limit": 2},
    "gpu": {"extra_resource_limits": {"nvidia.com/gpu": "1"}, "node_selector": {"kind": "gpu"}},
}


class Credentials:
    """Makes credentials without a registry."""

    def __init__(self) -> None:
        self.made: list[tuple[str, str]] = []

    async def make(self, key: str, image: Any) -> tuple[str, str]:
        self.made.append((key, image.reference))
        return f"robot$hub-{key}", "a secret"


class Api:
    """The calls of Kubernetes' API that a pull secret needs."""

    def __init__(self) -> None:
        self.secrets: dict[tuple[str, str], dict[str, Any]] = {}

    async def create_namespaced_secret(self, namespace: str, body: dict[str, Any]) -> None:
        name = body["metadata"]["name"]
        if (namespace, name) in self.secrets:
            error = RuntimeError("AlreadyExists")
            error.status = 409  # type: ignore[attr-defined]
            raise error
        self.secrets[namespace, name] = body

    async def delete_namespaced_secret(self, name: str, namespace: str) -> None:
        if (namespace, name) not in self.secrets:
            error = RuntimeError("NotFound")
            error.status = 404  # type: ignore[attr-defined]
            raise error
        del self.secrets[namespace, name]


class Spawner(UpperdeckKubeSpawner):
    """KubeSpawner without a cluster."""

    fake: FakeManager

    @property
    def upperdeck_manager(self) -> Manager:
        return self.fake


@pytest.fixture(autouse=True)
def _cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names a cluster that is never called."""
    (tmp_path / "config").write_text(
        "apiVersion: v1\nkind: Config\ncurrent-context: x\nusers: [{name: x, user: {token: x}}]\n"
        "contexts: [{name: x, context: {cluster: x, user: x}}]\n"
        "clusters: [{name: x, cluster: {server: 'https://127.0.0.1:1'}}]\n"
    )
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    monkeypatch.setattr("kubernetes_asyncio.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "config"))


def spawner(manager: FakeManager, user: str, options: dict[str, Any] | None = None, **more: Any) -> Spawner:
    config = Config()
    config.KubeSpawner.profile_list = profile_list(SITE, overrides=OVERRIDES)
    config.KubeSpawner.namespace = "hub"
    config.UpperdeckMixin.upperdeck_target = "harbor.example.org/{user}/{name}:{tag}"
    config.UpperdeckMixin.upperdeck_service_url = "http://hub:10101/services/upperdeck/"
    orm = SimpleNamespace(name=more.pop("server", ""), server=None, user_options=None, state=None)
    of = SimpleNamespace(
        name=user, groups=[], url=f"/user/{user}/", server=None, spawners={}, settings={}, id=1, escaped_name=user
    )
    Spawner.fake = manager
    made = Spawner(
        hub=Hub(base_url="/hub/"), user=of, orm_spawner=orm, config=config, _mock=True, api_token="token",
        oauth_client_id="x", user_options=options or {}, **more,
    )  # fmt: skip
    made.server = Server()
    made.api = Api()
    return made


def everyone(manager: FakeManager) -> None:
    for number, user in enumerate(USERS):
        manager.images.append(image(owner_of(user), "work", f"{number:x}", save=f"save-{number}"))


@pytest.mark.parametrize("user", USERS)
async def test_each_user_starts_from_the_own_image(user: str) -> None:
    manager = FakeManager()
    everyone(manager)
    profiles = await profile_list(SITE, manager=manager)(spawner(manager, user))
    assert profiles[0]["slug"] == "base"
    own = profiles[1:]
    assert len(own) == 1, "the images of others are not offered"
    started = spawner(manager, user, {"profile": own[0]["slug"]})
    credentials = Credentials()
    started.upperdeck_pull_secrets = PullSecrets(credentials)
    await started.load_user_options()
    pod = await started.get_pod_manifest()
    container = pod.spec.containers[0]
    digest = "sha256:" + f"{USERS.index(user):x}" * 64
    assert container.image == f"harbor.example.org/{owner_of(user)}/work@{digest}"
    assert container.resources.limits["cpu"] == 2
    environment = {one.name: one.value for one in container.env}
    assert environment["UPPERDECK_OWNER"] == owner_of(user)
    assert environment["UPPERDECK_SERVICE_URL"] == "http://hub:10101/services/upperdeck/"
    # The pull secret is in the pod, by a name that Kubernetes accepts, and nothing of it in the environment.
    names = [one["name"] if isinstance(one, dict) else one.name for one in pod.spec.image_pull_secrets]
    assert names == [f"upperdeck-pull-{credentials.made[0][0]}"]
    assert len(names[0]) <= 63
    assert all((char.isalnum() and char.isascii() and not char.isupper()) or char == "-" for char in names[0])
    written = started.api.secrets["hub", names[0]]
    assert written["type"] == "kubernetes.io/dockerconfigjson"
    config = json.loads(base64.b64decode(written["data"][".dockerconfigjson"]))
    assert list(config["auths"]) == ["harbor.example.org"]
    assert "a secret" not in json.dumps(environment)
    # A second start replaces it.
    await started.load_user_options()
    assert len(started.api.secrets) == 1
    assert started.upperdeck_session() == {"namespace": "hub", "pod": started.pod_name, "container": "notebook"}


async def with_a_pull_secret() -> Spawner:
    """Returns alice's spawner after the Secret of her image was written, and before the pod is made."""
    manager = FakeManager()
    manager.images = [image("alice", "work", "1")]
    started = spawner(manager, "alice", {"image": "harbor.example.org/alice/work:monday"})
    started.upperdeck_pull_secrets = PullSecrets(Credentials())
    await started.load_user_options()
    return started


async def test_the_pull_secret_is_deleted_at_the_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    async def stop(self: Any, now: bool = False) -> None:
        pass

    monkeypatch.setattr(KubeSpawner, "stop", stop)
    started = await with_a_pull_secret()
    assert len(started.api.secrets) == 1
    await started.stop(now=True)
    assert started.api.secrets == {}
    # There is none for an image of the site, and a cluster that is away does not keep a server from stopping.
    await started.stop(now=True)
    await started.load_user_options()
    started.api = None
    await started.stop(now=True)


async def test_the_pull_secret_of_a_pod_that_others_deleted_is_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int | None] = [None]

    async def poll(self: Any) -> int | None:
        return ended[0]

    monkeypatch.setattr(KubeSpawner, "poll", poll)
    started = await with_a_pull_secret()
    assert await started.poll() is None
    ended[0] = 1
    # Before its pod is made, a server has the Secret.
    started._start_pending = True
    assert await started.poll() == 1
    assert len(started.api.secrets) == 1
    started._start_pending = False
    assert await started.poll() == 1
    assert started.api.secrets == {}
    # The hub has started again meanwhile, and knows nothing of it.
    again = spawner(FakeManager(), "alice")
    again.upperdeck_pull_secrets = PullSecrets(Credentials())
    again.api.secrets = {("hub", f"upperdeck-pull-{secret_key('alice', '')}"): {}}
    assert await again.poll() == 1
    assert again.api.secrets == {}


async def test_a_secret_that_goes_while_it_is_replaced_is_written() -> None:
    started = await with_a_pull_secret()
    create = started.api.create_namespaced_secret

    async def gone_after_a_conflict(namespace: str, body: dict[str, Any]) -> None:
        try:
            await create(namespace, body)
        finally:
            if started.api.secrets.get((namespace, body["metadata"]["name"])) is not body:
                started.api.secrets.clear()

    started.api.create_namespaced_secret = gone_after_a_conflict
    await started.load_user_options()
    assert len(started.api.secrets) == 1


async def test_named_servers_are_sessions_of_one_owner() -> None:
    manager = FakeManager()
    manager.images = [image(owner_of("carol@example.com"), "work", "1")]
    pods, secrets = set(), set()
    for server in ("", "gpu", "Ünal Öz"):
        made = spawner(manager, "carol@example.com", server=server)
        made.upperdeck_pull_secrets = PullSecrets(Credentials())
        [_, own] = await made.profile_list(made)
        made.user_options = {"profile": own["slug"]}
        await made.load_user_options()
        assert made.get_env()["UPPERDECK_OWNER"] == owner_of("carol@example.com")
        pods.add(made.upperdeck_session()["pod"])
        secrets |= {one["name"] for one in made.image_pull_secrets}
    assert len(pods) == len(secrets) == 3


async def test_an_image_of_another_user_cannot_be_named() -> None:
    manager = FakeManager()
    everyone(manager)
    theirs = (await profile_list(SITE, manager=manager)(spawner(manager, "Bob")))[1]
    with pytest.raises(web.HTTPError) as refused:
        await spawner(manager, "alice", {"profile": theirs["slug"]}).load_user_options()
    assert refused.value.status_code == 403
    # Nor by a free text that a profile of the site would let through, in any notation.
    reference = theirs["kubespawner_override"]["image"]
    for text in (reference, reference.upper(), f" docker://{reference}", reference.replace(".org/", ".org:443/")):
        free = spawner(manager, "alice", {})
        free.profile_list = [{"display_name": "Any", "slug": "any", "kubespawner_override": {"image": text}}]
        with pytest.raises(web.HTTPError) as refused:
            await free.load_user_options()
        assert refused.value.status_code == 403, text


async def test_a_link_names_an_image_by_its_reference() -> None:
    """As the portal's links do (--start-url), also one that is too old for the page."""
    manager = FakeManager()
    everyone(manager)
    old = image("alice", "old", "e", changed="2020-01-01T00:00:00Z")
    manager.images += [image("alice", f"new-{number}", "d") for number in range(50)] + [old]
    options = spawner(manager, "alice").options_from_form({"image": [old["tags"][0]["reference"]]})
    started = spawner(manager, "alice", options)
    await started.load_user_options()
    assert started.image == f"harbor.example.org/alice/old@{old['digest']}"
    assert started.get_state()["upperdeck"]["image_name"] == "old"
    for other in (
        "harbor.example.org/bob/x:1",
        f"harbor.example.org/{owner_of('Bob')}/work:monday",
        "saved-",
        ["x"],
        "quay.io/x",
    ):
        with pytest.raises(web.HTTPError) as refused:
            await spawner(manager, "alice", {"image": other}).load_user_options()
        assert refused.value.status_code in (400, 403), other


async def test_what_is_shared_can_be_started_until_it_is_not() -> None:
    manager = FakeManager()
    everyone(manager)
    manager.shared["alice"] = [image(owner_of("Bob"), "work", "1", category="gpu")]
    shared = (await profile_list(SITE, manager=manager, overrides=OVERRIDES)(spawner(manager, "alice")))[2]
    assert owner_of("Bob") in shared["display_name"]
    started = spawner(manager, "alice", {"profile": shared["slug"]})
    await started.load_user_options()
    pod = await started.get_pod_manifest()
    assert pod.spec.containers[0].resources.limits["nvidia.com/gpu"] == "1"
    assert pod.spec.node_selector == {"kind": "gpu"}
    manager.shared.clear()
    with pytest.raises(web.HTTPError) as refused:
        await spawner(manager, "alice", {"profile": shared["slug"]}).load_user_options()
    assert refused.value.status_code == 403


async def test_texts_of_others_are_text_in_the_page() -> None:
    manager = FakeManager()
    hostile = "{{ ''.__class__.__mro__ }}<script>alert(1)</script>"
    manager.shared["alice"] = [image("mallory", "work", "1", message=hostile, session_name=hostile)]
    manager.images = [image("alice", "own", "2", save="save-2")]
    manager.packages["save-2"] = {
        "packages": [{"name": hostile, "version": hostile, "change": "added", "manager": "pip"}]
    }
    form = await spawner(manager, "alice").get_options_form()
    assert "mallory" in form
    assert "<script>alert" not in form
    assert "{{" not in form
    assert "&#123;&#123; &#x27;&#x27;.__class__" in form


async def test_without_the_manager_the_sites_profiles_start_and_the_page_says_so() -> None:
    manager = FakeManager()
    manager.down = True
    made = spawner(manager, "alice", {"profile": "base"})
    form = await made.get_options_form()
    assert "cannot be listed" in form
    await made.load_user_options()
    assert made.image == "quay.io/base:1"
    # A saved image is not started unchecked.
    with pytest.raises(web.HTTPError) as refused:
        await spawner(manager, "alice", {"profile": "saved-0"}).load_user_options()
    assert refused.value.status_code == 503
    made.profile_list = [
        {"display_name": "x", "slug": "base", "kubespawner_override": {"image": "harbor.example.org/alice/x@sha256:0"}}
    ]
    with pytest.raises(web.HTTPError) as refused:
        await made.load_user_options()
    assert refused.value.status_code == 503


async def test_what_the_last_stop_saved_is_chosen() -> None:
    manager = FakeManager()
    manager.images = [image("alice", "work", "1"), image("alice", "course", "2")]
    made = spawner(manager, "alice", {"profile": "base"})
    for name in ("work", "course"):
        made._last_stop = Outcome.now(True, ("saved", {"image": f"{name}:monday"}))
        form = await made.get_options_form()
        [key] = [found.key for found in await made.upperdeck_images() if found.name == name]
        [chosen] = re.findall(r'<input[^>]*value="([^"]*)"[^>]*checked', form, re.DOTALL)[:1]
        assert chosen == key
    made._last_stop = Outcome.now(False, ("saved_not", {"reason": "x"}))
    assert made.upperdeck_continued(await made.upperdeck_images()) is None


async def test_the_choice_to_save_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = FakeManager()
    form = {"profile": ["base"], "upperdeck_save_on_stop": ["no", "yes"]}
    made = spawner(manager, "alice")
    options = made.options_from_form(form)
    assert options == {"profile": "base", "upperdeck_save_on_stop": True}
    started = spawner(manager, "alice", options)
    await started.load_user_options()
    assert started.upperdeck_saves
    again = spawner(FakeManager(), "alice")
    again.load_state(started.get_state())
    assert again.upperdeck_saves
    saved: list[str] = []

    async def stop(self: Any, now: bool = False) -> None:
        saved.append("stopped")

    async def save(self: Any) -> None:
        saved.append("saved")

    monkeypatch.setattr(KubeSpawner, "stop", stop)
    monkeypatch.setattr(UpperdeckKubeSpawner, "upperdeck_save", save)
    await again.stop()
    await again.stop(now=True)
    again.save_on_stop = "never"
    await again.stop()
    assert saved == ["saved", "stopped", "stopped", "stopped"]
