"""A stand-in for the manager where a test is about what the hub makes of its replies."""

from __future__ import annotations

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
    """Answers from `images` (of all users), `shared` (by user) and `packages` (by save); `down`: not at all."""

    def __init__(self) -> None:
        self.images: list[dict[str, Any]] = []
        self.shared: dict[str, list[dict[str, Any]]] = {}
        self.packages: dict[str, dict[str, Any]] = {}
        self.down = False
        self.asked: list[tuple[str, str, str]] = []

    async def call(self, method: str, where: str, owner: str, **more: Any) -> dict[str, Any]:
        self.asked.append((method, where, owner))
        if self.down:
            raise Problem.unavailable("the image manager cannot be reached: refused")
        if where == "/api/v1/images":
            return {"images": [one for one in self.images if one["user"] == owner]}
        if where == "/api/v1/shared":
            return {"images": self.shared.get(owner, [])}
        save = where.split("/")[4]
        if where.endswith("/packages") and save in self.packages:
            return self.packages[save]
        raise Problem(404, {"code": "not_found", "detail": "It is not there."})
