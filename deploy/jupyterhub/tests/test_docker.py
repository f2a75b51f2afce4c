"""DockerSpawner with saved images: its form, and what its own check lets through."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from tornado import web
from traitlets import TraitError
from traitlets.config import Config

from fake import FakeManager, image
from jupyterhub_upperdeck.docker import UpperdeckDockerSpawner
from jupyterhub_upperdeck.images import _read
from jupyterhub_upperdeck.manager import Manager
from jupyterhub_upperdeck.stopping import Outcome

MINE = image("alice", "mine", "1")
THEIRS = image("bob", "theirs", "2")
SHARED = image("carol", "shared", "3", message="<i>{{ 7 * 7 }}</i>")


class Spawner(UpperdeckDockerSpawner):
    """DockerSpawner without a daemon."""

    fake: FakeManager

    @property
    def upperdeck_manager(self) -> Manager:
        return self.fake


def spawner(allowed: Any = None, options: dict[str, Any] | None = None) -> Spawner:
    config = Config()
    config.DockerSpawner.allowed_images = {"Base": "quay.io/base:1"} if allowed is None else allowed
    config.UpperdeckMixin.upperdeck_target = "harbor.example.org/{user}/{name}:{tag}"
    Spawner.fake = FakeManager()
    Spawner.fake.images = [MINE, THEIRS]
    Spawner.fake.shared = {"alice": [SHARED]}
    user = SimpleNamespace(name="alice", groups=[], url="/user/alice/", server=None, spawners={}, settings={}, id=1)
    orm = SimpleNamespace(name="", server=None, user_options=None, state=None)
    return Spawner(user=user, orm_spawner=orm, config=config, user_options=options or {})


def key(entry: dict[str, Any]) -> str:
    found = _read(entry, shared=False)
    assert found is not None
    return found.key


async def test_the_form_has_the_sites_images_and_the_users() -> None:
    form = await spawner().get_options_form()
    for shown in ("Base", key(MINE), key(SHARED), "shared by carol", "&lt;i&gt;&#123;&#123; 7 * 7 &#125;&#125;"):
        assert shown in form, form
    assert key(THEIRS) not in form
    assert "{{" not in form
    chosen = spawner().options_from_form({"image": [key(MINE)], "upperdeck_save_on_stop": ["no"]})
    assert chosen == {"image": key(MINE), "upperdeck_save_on_stop": False}


async def test_what_the_last_stop_saved_is_chosen() -> None:
    made = spawner(options={"image": "Base"})
    made._last_stop = Outcome.now(True, ("saved", {"image": "mine:monday"}))
    assert f'value="{key(MINE)}" checked' in await made.get_options_form()
    made._last_stop = None
    assert 'value="Base" checked' in await made.get_options_form()


async def test_only_images_of_the_user_are_started() -> None:
    made = spawner()
    assert await made.check_allowed("Base") == "quay.io/base:1"
    assert await made.check_allowed(key(MINE)) == f"harbor.example.org/alice/mine@{MINE['digest']}"
    assert await made.check_allowed(key(SHARED)) == f"harbor.example.org/carol/shared@{SHARED['digest']}"
    # As a link of the portal names it.
    by_tag = await made.check_allowed(MINE["tags"][0]["reference"])
    assert by_tag == f"harbor.example.org/alice/mine@{MINE['digest']}"
    for refused in (key(THEIRS), "saved-", ["Base"], {}, 7, "harbor.example.org/bob/theirs:monday", "quay.io/other:1"):
        with pytest.raises(web.HTTPError) as error:
            await made.check_allowed(refused)
        assert error.value.status_code in (400, 403), refused


async def test_a_site_that_allows_any_image_allows_no_other_users() -> None:
    made = spawner(allowed="*")
    assert await made.check_allowed("quay.io/other:1") == "quay.io/other:1"
    for refused in (f"harbor.example.org/bob/theirs@{THEIRS['digest']}", "HARBOR.example.org:443/bob/theirs:monday"):
        with pytest.raises(web.HTTPError) as error:
            await made.check_allowed(refused)
        assert error.value.status_code == 403


async def test_without_the_manager_no_saved_image_is_started() -> None:
    made = spawner()
    made.fake.down = True
    assert "cannot be listed" in await made.get_options_form()
    with pytest.raises(web.HTTPError) as error:
        await made.check_allowed(key(MINE))
    assert error.value.status_code == 503


@pytest.mark.parametrize("target", ["harbor.example.org/{name}:{tag}", "{user}/{name}:{tag}", "harbor.example.org"])
def test_a_target_that_says_nothing_of_users_is_refused(target: str) -> None:
    with pytest.raises(TraitError, match="upperdeck_target"):
        spawner().upperdeck_target = target


def test_the_container_is_the_session() -> None:
    made = spawner()
    assert made.upperdeck_session() is None
    made.object_id = "f" * 64
    assert made.upperdeck_session() == "f" * 64
    assert made.get_state()["upperdeck"]["session"] == "f" * 64
