"""DockerSpawner with saved images."""

from __future__ import annotations

from typing import Any

from dockerspawner import DockerSpawner
from traitlets import default

from .images import KEY_PREFIX
from .spawner import IMAGE_OPTION, ImageForm


class UpperdeckDockerSpawner(ImageForm, DockerSpawner):
    """DockerSpawner whose form offers ``allowed_images`` and the user's saved images."""

    @default("options_form")
    def _default_options_form(self) -> Any:
        return type(self).upperdeck_options_form

    @default("options_from_form")
    def _default_options_from_form(self) -> Any:
        return self.upperdeck_options_from_form

    def upperdeck_site_images(self) -> dict[str, str]:
        allowed = self._get_allowed_images()
        return dict(allowed) if isinstance(allowed, dict) else {}

    async def check_allowed(self, image: str) -> str:
        """Returns the reference of an image that a request names, if the user may start it now."""
        if str(image).startswith(KEY_PREFIX):
            return (await self.upperdeck_resolve(str(image))).reference
        reference = str(await super().check_allowed(image))
        # `allowed_images = "*"` allows any image of the site's, but none that another user saved.
        await self.upperdeck_check(reference)
        return reference

    async def start(self) -> Any:
        self.upperdeck_started()
        if (self.user_options or {}).get(IMAGE_OPTION) == "":
            self.user_options.pop(IMAGE_OPTION)
        return await super().start()
