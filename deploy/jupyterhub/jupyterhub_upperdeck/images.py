"""Saved images that a user may start a server from."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from .manager import Json, Manager, Problem, path
from .starting import Judgement, judge_packages
from .text import date, shorten, size

KEY_PREFIX = "saved-"
"""Beginning of the key by which a form or a request names a saved image. No reference begins so."""
_CONCURRENT = 8
_NAMED = 5


@dataclass(frozen=True)
class SavedImage:
    """A saved image, as the manager lists it for a user."""

    owner: str
    name: str
    digest: str
    repository: str
    tags: tuple[str, ...]
    shared: bool
    message: str = ""
    changed: str = ""
    bytes: int | None = None
    gpu: bool = False
    save: str | None = None
    session_name: str = ""
    packages: Json | None = field(default=None, hash=False, compare=False)

    @property
    def key(self) -> str:
        """What a form or a request names it by. It is looked up among the user's images, never used as a reference."""
        digest = hashlib.sha256(f"{self.owner}/{self.name}@{self.digest}".encode()).hexdigest()
        return KEY_PREFIX + digest[:24]

    @property
    def reference(self) -> str:
        """The complete reference with the digest: what is started is what was looked at, whatever its tag names now."""
        return f"{self.repository}@{self.digest}"

    @property
    def title(self) -> str:
        """Name and tag for people."""
        name = f"{self.name}:{self.tags[0]}" if self.tags else self.name
        return f"{name} ({self.owner})" if self.shared else name

    @property
    def added(self) -> str:
        """The packages that its base does not have in this version, a few by name."""
        found = (self.packages or {}).get("packages", [])
        new = [one for one in found if one.get("change") in ("added", "changed")]
        named = [f"{one.get('name', '')} {one.get('version') or ''}".strip() for one in new]
        # What a user installs is of interest before what the distribution brings.
        listed = [shorten(name, 60) for name in named[:_NAMED]]
        more = len(named) - len(listed) + int((self.packages or {}).get("more", 0) or 0)
        return ", ".join(listed) + (f" and {more} more" if more > 0 else "")

    @property
    def details(self) -> list[str]:
        """What is said of it besides its name, as short texts."""
        parts = [
            date(self.changed),
            size(self.bytes),
            "GPU" if self.gpu else "CPU",
            f"shared by {self.owner}" if self.shared else "",
            f"added: {self.added}" if self.added else "",
        ]
        return [part for part in parts if part]

    @property
    def judgement(self) -> Judgement:
        """Whether it will start on a hub."""
        return judge_packages(self.packages)


def _read(entry: Json, shared: bool) -> SavedImage | None:
    repository, digest = str(entry.get("repository", "")), str(entry.get("digest", ""))
    # An image in a layout directory is in no registry, so no runtime can pull it.
    if not digest.startswith("sha256:") or not repository or repository.startswith("oci:"):
        return None
    tags = [str(tag.get("name", "")) for tag in entry.get("tags", []) if isinstance(tag, dict)]
    size = entry.get("size")
    return SavedImage(
        owner=str(entry.get("user", "")),
        name=str(entry.get("name", "")),
        digest=digest,
        repository=repository,
        tags=tuple(tags),
        shared=shared,
        message=str(entry.get("message") or ""),
        changed=str(entry.get("changed") or ""),
        bytes=size if isinstance(size, int) else None,
        gpu=entry.get("category") == "gpu",
        save=entry.get("save"),
        session_name=str(entry.get("session_name") or ""),
    )


async def saved_images(
    manager: Manager, owner: str, *, groups: Iterable[str] = (), most: int = 500
) -> list[SavedImage]:
    """Returns the images that ``owner`` saved, then those that others share with ``owner``, each the newest first.

    Fails with :class:`Problem`.
    """
    groups = list(groups)
    own, shared = await asyncio.gather(
        manager.every(path("images"), "images", owner, query={"sort": "updated"}, most=most),
        manager.every(path("shared"), "images", owner, groups=groups, most=most),
    )
    found = []
    for entries, theirs in ((own, False), (shared, True)):
        read = [image for image in (_read(entry, theirs) for entry in entries) if image]
        # The manager sees to this, too; a list that it sends by mistake must not become an offer.
        read = [image for image in read if theirs or image.owner == owner]
        found += sorted(read, key=lambda image: image.changed, reverse=True)
    return found


async def with_packages(manager: Manager, owner: str, images: list[SavedImage]) -> list[SavedImage]:
    """Returns the images with the packages that were added, where the manager tells ``owner``."""
    places = asyncio.Semaphore(_CONCURRENT)

    async def look(image: SavedImage) -> SavedImage:
        if image.save is None or image.shared:
            return image
        async with places:
            try:
                found = await manager.call("GET", path("saves", image.save, "packages"), owner)
            except Problem:
                # A save without a list, e.g. of an earlier version: the image can be started all the same.
                return image
        return replace(image, packages=found)

    return list(await asyncio.gather(*map(look, images)))


async def find(manager: Manager, owner: str, key: str, *, groups: Iterable[str] = ()) -> SavedImage | None:
    """Returns the image that a form or a request names, if ``owner`` may start it now."""
    images = await saved_images(manager, owner, groups=groups)
    return next((image for image in images if image.key == key), None)


async def permitted(manager: Manager, owner: str, reference: str, *, groups: Iterable[str] = ()) -> SavedImage | None:
    """Returns the image with this reference, if ``owner`` may start it now."""
    images = await saved_images(manager, owner, groups=groups)
    return next((image for image in images if image.reference == reference), None)
