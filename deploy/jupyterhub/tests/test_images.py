"""Lists of images, however long they are and however slow the manager is."""

from __future__ import annotations

import pytest

from fake import FakeManager, image
from jupyterhub_upperdeck import images as listed
from jupyterhub_upperdeck.hub import Server
from jupyterhub_upperdeck.images import find, saved_images, with_packages
from jupyterhub_upperdeck.manager import Problem
from jupyterhub_upperdeck.session import spawn_page
from jupyterhub_upperdeck.spawner import warnings


def many(count: int) -> FakeManager:
    manager = FakeManager()
    manager.images = [
        image("alice", f"work-{number}", "1", changed=f"2026-01-01T00:00:00.{number:06}Z", save=f"save-{number}")
        for number in range(count)
    ]
    return manager


async def test_a_page_asks_for_what_it_shows() -> None:
    manager = many(10_000)
    shown = await with_packages(manager, await saved_images(manager, "alice", most=30))
    assert [one.name for one in shown] == [f"work-{number}" for number in range(9_999, 9_969, -1)]
    assert len(manager.asked) == 1 + 1 + 30, "a list, what is shared, the packages of each"


async def test_the_oldest_of_many_can_be_started() -> None:
    manager = many(10_000)
    oldest = manager.images[0]
    found = await find(manager, "alice", oldest["tags"][0]["reference"])
    assert found is not None
    assert found.name == "work-0"
    assert await find(manager, "alice", found.key) == found
    assert await find(manager, "alice", "saved-") is None
    assert await find(manager, "bob", found.key) is None


async def test_the_owner_of_a_shared_image_is_told_its_packages() -> None:
    manager = FakeManager()
    shared = image("alice", "work", "1", save="save-1", kind="jupyter")
    manager.shared = {"bob": [shared]}
    removed = {"name": "jupyterhub", "change": "removed", "manager": "pip", "location": "opt/venv"}
    manager.packages = {"save-1": {"packages": [removed]}}
    [shown] = await with_packages(manager, await saved_images(manager, "bob", most=30))
    assert ("GET", "/api/v1/saves/save-1/packages", "alice") in manager.asked
    [warning] = warnings(shown)
    assert warning.startswith("Does not start on this hub: The package jupyterhub was removed")
    # What is not shared with bob is not asked about.
    manager.shared = {}
    assert await with_packages(manager, await saved_images(manager, "bob", most=30)) == []


async def test_a_slow_manager_does_not_hold_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listed, "_LISTED_S", 0.05)
    monkeypatch.setattr(listed, "_PACKAGES_S", 0.05)
    manager = many(30)
    shown = await saved_images(manager, "alice", most=30)
    manager.slow = True
    # They can be started without the packages being known.
    assert await with_packages(manager, shown) == shown
    with pytest.raises(Problem, match="did not respond"):
        await saved_images(manager, "alice", most=30)


@pytest.mark.parametrize(
    ("user", "server", "path"),
    [
        ("alice", "", "/hub/spawn/alice"),
        ("bob@example.org", "", "/hub/spawn/bob@example.org"),
        ("a/b", "c d?#%/..", "/hub/spawn/a%2Fb/c%20d%3F%23%25%2F.."),
    ],
)
def test_the_spawn_page_of_odd_names(user: str, server: str, path: str) -> None:
    assert spawn_page("/hub/", Server(user, server, None)) == path
