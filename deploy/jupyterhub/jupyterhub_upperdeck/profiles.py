"""A ``profile_list`` for KubeSpawner: the site's profiles, and the images that the user saved or that are shared."""

from __future__ import annotations

import copy
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from .images import SavedImage, saved_images, with_packages
from .manager import Json, Manager, Problem
from .owner import owner_of
from .spawner import groups_of, warnings
from .text import markup
from .words import Words, english, words_of

Override = Mapping[str, Any]


def profile(image: SavedImage, overrides: Mapping[str, Override], words: Words = english) -> Json:
    """Returns the profile of a saved image. KubeSpawner's template does not escape, so the texts are escaped here."""
    category = "gpu" if image.gpu else "cpu"
    parts = [markup(image.message, 200), markup(" · ".join(image.details(words)), 300)]
    parts += [markup(text, 400) for text in warnings(image, words)]
    override = copy.deepcopy(dict(overrides.get(category, {})))
    override["image"] = image.reference
    return {
        "display_name": markup(image.title),
        "slug": image.key,
        "description": "<br>".join(part for part in parts if part),
        "kubespawner_override": override,
    }


def profile_list(
    base: Sequence[Json] | Callable[[Any], Any] = (),
    *,
    overrides: Mapping[str, Override] | None = None,
    manager: Manager | None = None,
    most: int = 30,
) -> Callable[[Any], Awaitable[list[Json]]]:
    """Returns a callable for ``c.KubeSpawner.profile_list``.

    `base` are the site's own profiles, or a callable that makes them; the first is the default. `overrides` has, for
    ``"cpu"`` and ``"gpu"``, what ``kubespawner_override`` of saved images of that kind contains besides the image:
    limits, node selectors, tolerations. `manager` is needed for spawners without
    :class:`~jupyterhub_upperdeck.UpperdeckMixin`. `most` limits the user's own images and the shared ones, each.

    KubeSpawner evaluates the list when it shows the page and again when it starts a server, so an image that was
    deleted, or is not shared any more, cannot be started by an old page or by a request.
    """
    resources = dict(overrides or {})
    if unknown := set(resources) - {"cpu", "gpu"}:
        raise ValueError(f"overrides: {sorted(unknown)} are not among cpu, gpu")

    async def of(spawner: Any) -> list[Json]:
        words = words_of(spawner)
        found = base(spawner) if callable(base) else base
        profiles = copy.deepcopy(list(await found if hasattr(found, "__await__") else found))
        if not profiles:
            profiles = [{"display_name": words("hub_image"), "slug": "hub", "default": True}]
        owner = owner_of(spawner.user.name)
        try:
            used = manager or spawner.upperdeck_manager
            images = await saved_images(used, owner, groups=groups_of(spawner), most=most)
            chosen = getattr(spawner, "upperdeck_chosen_image", None)
            if chosen is not None and chosen.key not in [image.key for image in images]:
                # Older than those that are shown, and named by a link.
                images.append(chosen)
            images = await with_packages(used, images)
        except Problem as problem:
            # The site's own profiles can be started without the manager.
            spawner.log.warning("Saved images of %s cannot be listed: %s", spawner.user.name, problem)
            note = markup(words("image_unlisted", reason=problem), 400)
            first = profiles[0]
            first["description"] = "<br>".join(filter(None, [first.get("description", ""), note]))
            return profiles
        if not any(one.get("default") for one in profiles):
            profiles[0]["default"] = True
        return profiles + [profile(image, resources, words) for image in images]

    return of
