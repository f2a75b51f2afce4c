"""Saved images that a user may start a server from."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field, replace

from .manager import PAGE, Json, Manager, Problem, path
from .starting import Judgement, judge_image
from .text import date, shorten, size
from .words import Words

KEY_PREFIX = "saved-"
"""Beginning of the key by which a form or a request names a saved image. No reference begins so."""
_CONCURRENT = 8
_NAMED = 5
_LISTED_S = 10.0
_PACKAGES_S = 5.0


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
    kind: str = ""
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
    def references(self) -> list[str]:
        """All that name it: by its digest, and by its tags."""
        return [self.reference, *(f"{self.repository}:{tag}" for tag in self.tags)]

    @property
    def title(self) -> str:
        """Name and tag for people."""
        name = f"{self.name}:{self.tags[0]}" if self.tags else self.name
        return f"{name} ({self.owner})" if self.shared else name

    def added(self, words: Words) -> str:
        """Returns the packages that its base does not have in this version, a few by name."""
        found = (self.packages or {}).get("packages", [])
        new = [one for one in found if one.get("change") in ("added", "changed")]
        named = [f"{one.get('name', '')} {one.get('version') or ''}".strip() for one in new]
        # What a user installs is of interest before what the distribution brings.
        listed = [shorten(name, 60) for name in named[:_NAMED]]
        more = len(named) - len(listed) + int((self.packages or {}).get("more", 0) or 0)
        packages = ", ".join(listed)
        return words("more", packages=packages, count=more) if more > 0 else packages

    def details(self, words: Words) -> list[str]:
        """Returns what is said of it besides its name, as short texts."""
        added = self.added(words)
        parts = [
            date(self.changed),
            size(self.bytes),
            "GPU" if self.gpu else "CPU",
            words("shared_by", owner=self.owner) if self.shared else "",
            words("added", packages=added) if added else "",
        ]
        return [part for part in parts if part]

    def judged(self, hub_version: str) -> Judgement:
        """Returns whether it will start on a hub of this version."""
        return judge_image(self.kind, self.packages, hub_version)


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
        kind=str(entry.get("kind") or ""),
        save=entry.get("save"),
        session_name=str(entry.get("session_name") or ""),
    )


async def _own(manager: Manager, owner: str, most: int | None = None) -> AsyncIterator[SavedImage]:
    """Gives the images that ``owner`` saved, the newest first; all, or the first ``most``."""
    count = 0
    async for entry in manager.entries(path("images"), "images", owner, query={"sort": "updated"}, limit=most or PAGE):
        image = _read(entry, shared=False)
        # The manager sees to this, too; a list that it sends by mistake must not become an offer.
        if image is not None and image.owner == owner:
            yield image
        count += 1
        if count == most:
            return


async def _shared(manager: Manager, owner: str, groups: Iterable[str]) -> AsyncIterator[SavedImage]:
    """Gives the images that others share with ``owner``."""
    async for entry in manager.entries(path("shared"), "images", owner, groups=groups):
        image = _read(entry, shared=True)
        if image is not None:
            yield image


async def saved_images(manager: Manager, owner: str, *, groups: Iterable[str] = (), most: int) -> list[SavedImage]:
    """Returns the images that ``owner`` saved, then those that others share with ``owner``.

    Each the newest first, and at most ``most``. Fails with :class:`Problem`, also if the manager is slow: a page waits
    for this.
    """
    try:
        async with asyncio.timeout(_LISTED_S):
            own = [image async for image in _own(manager, owner, most)]
            shared = [image async for image in _shared(manager, owner, groups)]
    except TimeoutError as error:
        raise Problem.unavailable(f"the image manager did not respond within {_LISTED_S:.0f} s") from error
    newest = sorted(shared, key=lambda image: image.changed, reverse=True)
    return own + newest[:most]


async def with_packages(manager: Manager, images: list[SavedImage]) -> list[SavedImage]:
    """Returns the images with the packages that were added, where the manager knows them, and soon.

    It tells the owner of an image. With whom it is shared may read the same in the image.
    """
    places = asyncio.Semaphore(_CONCURRENT)
    found: dict[str, Json] = {}

    async def look(save: str, owner: str) -> None:
        async with places:
            # A save without a list, e.g. of an earlier version: the image can be started all the same.
            with contextlib.suppress(Problem):
                found[save] = await manager.call("GET", path("saves", save, "packages"), owner)

    saves = {image.save: image.owner for image in images if image.save is not None}
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_PACKAGES_S):
            await asyncio.gather(*(look(save, owner) for save, owner in saves.items()))
    return [replace(image, packages=found.get(image.save)) if image.save else image for image in images]


async def find(manager: Manager, owner: str, named: str, *, groups: Iterable[str] = ()) -> SavedImage | None:
    """Returns the image that a form or a request names by its key or a reference, if ``owner`` may start it now."""
    for images in (_own(manager, owner), _shared(manager, owner, groups)):
        async for image in images:
            if named == image.key or named in image.references:
                return image
    return None
