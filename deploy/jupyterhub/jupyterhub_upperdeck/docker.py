"""DockerSpawner with saved images."""

from __future__ import annotations

from typing import Any

from docker.errors import NotFound
from dockerspawner import DockerSpawner

from .spawner import IMAGE_OPTION, ImageForm


class UpperdeckDockerSpawner(ImageForm, DockerSpawner):
    """DockerSpawner whose form offers ``allowed_images`` and the user's saved images."""

    def upperdeck_site_images(self) -> dict[str, str]:
        allowed = self._get_allowed_images()
        return dict(allowed) if isinstance(allowed, dict) else {}

    async def check_allowed(self, image: str) -> str:
        """Returns the reference of an image that a request names, if the user may start it now."""
        if self.upperdeck_is_saved(image):
            return (await self.upperdeck_resolve(image)).reference
        reference = str(await super().check_allowed(image))
        # `allowed_images = "*"` allows any image of the site's, but none that another user saved.
        await self.upperdeck_check(reference)
        return reference

    async def pull_image(self, image: str) -> None:
        """Pulls an image if needed. DockerSpawner itself takes a digest for a tag."""
        repository, at, digest = image.partition("@")
        if not at or self.pull_policy in ("skip", "never"):
            await super().pull_image(image)
            return
        # A digest names the same content for ever, so that it is pulled once, also with the policy "always".
        try:
            await self.docker("inspect_image", image)
        except NotFound:
            self.log.info("pulling %s", image)
            await self.docker("pull", repository, digest)

    async def start(self) -> Any:
        self.upperdeck_started()
        if (self.user_options or {}).get(IMAGE_OPTION) == "":
            self.user_options.pop(IMAGE_OPTION)
        return await super().start()
