"""KubeSpawner with saved images, and pull secrets for private projects."""

from __future__ import annotations

import contextlib
from typing import Any

from kubespawner import KubeSpawner
from tornado import web
from traitlets import Any as AnyTrait

from .images import KEY_PREFIX, SavedImage, saved_images
from .manager import Problem
from .spawner import IMAGE_OPTION, UpperdeckMixin, groups_of
from .words import words_of

_LOOKED_AT = 30


class UpperdeckKubeSpawner(UpperdeckMixin, KubeSpawner):
    """KubeSpawner that checks saved images, pulls them with a credential of its own, and saves before a stop."""

    upperdeck_pull_secrets = AnyTrait(
        None,
        allow_none=True,
        help="A jupyterhub_upperdeck.pull.PullSecrets: makes a credential for each start from a private project. "
        "Without it, image_pull_secrets or the nodes have one for all.",
    ).tag(config=True)
    # After a restart of the hub, there may be one of a server that ended meanwhile.
    _pull_secret_removed = False

    async def get_options_form(self) -> str:
        if self._last_stop is not None:
            with contextlib.suppress(Problem):
                images = await saved_images(
                    self.upperdeck_manager, self.upperdeck_owner, groups=groups_of(self), most=_LOOKED_AT
                )
                if key := self.upperdeck_continued(images):
                    # What KubeSpawner's template marks as chosen. A start sets the options that the user sends.
                    self.user_options: Any = {**(self.user_options or {}), "profile": key}
        return await super().get_options_form()

    def _options_from_form(self, formdata: dict[str, list[Any]]) -> dict[str, Any]:
        form = dict(formdata)
        chosen = self.upperdeck_chosen(form)
        if image := form.pop(IMAGE_OPTION, None):
            chosen[IMAGE_OPTION] = str(image[0])
        return {**super()._options_from_form(form), **chosen}

    async def load_user_options(self) -> None:
        self.upperdeck_started()
        await self._resolve_profile()
        await super().load_user_options()
        # Once more for the image itself: a profile of the site may let users write one.
        image = await self.upperdeck_check(str(self.image))
        if image is not None:
            await self._add_pull_secret(image)

    async def stop(self, now: bool = False) -> Any:
        stopped = await super().stop(now=now)
        await self._remove_pull_secret()
        return stopped

    async def poll(self) -> Any:
        status = await super().poll()
        # A pod that ended, or that others deleted, the hub does not stop; one that is being made has its Secret first.
        if status is not None and not self._start_pending:
            await self._remove_pull_secret()
        return status

    async def _resolve_profile(self) -> None:
        """Looks up the saved image that the user chose by a profile, or that a link names by its reference."""
        options: dict[str, Any] = self.user_options
        profile, image = options.get("profile"), options.get(IMAGE_OPTION)
        if profile:
            if isinstance(profile, str) and profile.startswith(KEY_PREFIX):
                await self.upperdeck_resolve(profile)
        elif image:
            if not self.upperdeck_is_saved(image):
                raise web.HTTPError(400, words_of(self)("image_not_offered"))
            options["profile"] = (await self.upperdeck_resolve(image)).key

    async def _remove_pull_secret(self) -> None:
        if self.upperdeck_pull_secrets is None or self._pull_secret_removed:
            return
        try:
            await self.upperdeck_pull_secrets.remove(self)
            self._pull_secret_removed = True
        except Problem as problem:
            self.log.warning("End of %s: %s", self._log_name, problem)

    async def _add_pull_secret(self, image: SavedImage) -> None:
        if self.upperdeck_pull_secrets is None:
            return
        self._pull_secret_removed = False
        if self.enable_user_namespaces:
            await self._ensure_namespace()
        try:
            name = await self.upperdeck_pull_secrets.ensure(self, image)
        except Problem as problem:
            raise web.HTTPError(503, words_of(self)("image_unpulled", reason=problem)) from problem
        known: list[dict[str, Any]] = list(self.image_pull_secrets or [])
        others = [one for one in known if one.get("name") != name]
        self.image_pull_secrets: Any = [*others, {"name": name}]
