"""A stand-in for the manager where a test is about what the hub makes of its replies."""

from __future__ import annotations

import asyncio
from typing import Any

from jupyterhub_upperdeck.manager import Manager, Problem


def image(user: str, name: str, digit: str, **more: Any) -> dict[str, Any]:
    """Returns an image as the manager lists it."""
    return {
        "user": user,
        "name": name,
        "digest": "sha256:" + digit * 64,
        "repository": f"harbor.example.org/{user}/{name}",
        "tags": [{"name": "monday", "reference": f"harbor.example.org/{user}/{name}:monday", "immutable": False}],
        "changed": f"2026-11-{10 + int(digit, 16)}T10:00:00Z",
        "size": 123_456_789,
        "category": "cpu",
        **more,
    }


class FakeManager(Manager):
    """Answers from `images` (of all users), `shared` (by user) and `packages` (by save).

    `down`: not at all; `slow`: not soon.
    """

    def __init__(self) -> None:
        self.images: list[dict[str, Any]] = []
        self.shared: dict[str, list[dict[str, Any]]] = {}
        self.packages: dict[str, dict[str, Any]] = {}
        self.down = False
        self.slow = False
        self.asked: list[tuple[str, str, str]] = []

    @staticmethod
    def page(images: list[dict[str, Any]], query: dict[str, Any]) -> dict[str, Any]:
        """Returns a page of a list, which has the newest first if that is asked for."""
        if query.get("sort") == "updated":
            images = sorted(images, key=lambda one: str(one["changed"]), reverse=True)
        begin = int(query.get("cursor") or 0)
        end = begin + int(query["limit"])
        return {"images": images[begin:end], "next": str(end) if end < len(images) else None}

    async def call(self, method: str, where: str, owner: str, **more: Any) -> dict[str, Any]:
        self.asked.append((method, where, owner))
        if self.down:
            raise Problem.unavailable("the image manager cannot be reached: refused")
        if self.slow:
            await asyncio.sleep(3600)
        if where == "/api/v1/images":
            return self.page([one for one in self.images if one["user"] == owner], more["query"])
        if where == "/api/v1/shared":
            return self.page(self.shared.get(owner, []), more["query"])
        save = where.split("/")[4]
        if where.endswith("/packages") and save in self.packages:
            return self.packages[save]
        raise Problem(404, {"code": "not_found", "detail": "It is not there."})
