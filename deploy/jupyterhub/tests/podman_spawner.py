"""A spawner for the tests: servers in Podman containers of this machine, on its network."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from jupyterhub.spawner import Spawner
from jupyterhub.utils import random_port
from traitlets import Dict, List, Unicode

from jupyterhub_upperdeck import ImageForm


class Containers(Spawner):
    """Starts containers as root would."""

    image = Unicode(config=True)
    site_images = Dict(config=True, help="The images that the form offers to all users.")
    podman_environment = Dict(config=True, help="Variables for podman itself.")
    mounts = List(Unicode(), config=True)
    container_environment = Dict(config=True)
    directory = Unicode(config=True, help="Where files with the environments are written.")

    container = ""

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.container = state.get("container", "")

    def get_state(self) -> dict[str, Any]:
        state = super().get_state()
        if self.container:
            state["container"] = self.container
        return state

    def clear_state(self) -> None:
        super().clear_state()
        self.container = ""

    async def podman(self, *words: str) -> str:
        process = await asyncio.create_subprocess_exec(
            "podman",
            *words,
            env=dict(self.podman_environment),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, error = await process.communicate()
        if process.returncode != 0:
            raise RuntimeError(f"podman {' '.join(words)}: {error.decode()}")
        return out.decode().strip()

    async def image_to_start(self) -> str:
        return self.image

    async def start(self) -> tuple[str, int]:
        image = await self.image_to_start()
        self.port = random_port()
        await self.podman("pull", "--quiet", "--tls-verify=false", image)
        # On a file, which only root reads: a command line is seen by all.
        file = Path(self.directory) / f"environment-{self.port}"
        file.touch(mode=0o600)
        environment = {**self.get_env(), **self.container_environment}
        file.write_text("".join(f"{name}={value}\n" for name, value in environment.items()))
        mounts = [word for mount in self.mounts for word in ("--volume", f"{mount}:{mount}:ro")]
        name = f"server-{self.port}"
        run = ["run", "--detach", "--network", "host", "--pull", "never", "--name", name, "--env-file", str(file)]
        self.container = await self.podman(*run, *mounts, image, *self.cmd, *self.get_args())
        file.unlink()
        return "127.0.0.1", self.port

    async def poll(self) -> int | None:
        if not self.container:
            return 0
        try:
            found = json.loads(await self.podman("inspect", self.container))[0]["State"]
        except RuntimeError:
            return 0
        return None if found["Running"] else int(found["ExitCode"])

    async def stop(self, now: bool = False) -> None:
        # With its changes: what was not saved is gone.
        await self.podman("rm", "--force", "--time", "2", self.container)


class PodmanSpawner(ImageForm, Containers):
    """The same with saved images, as a site would write it for a spawner of its own."""

    def upperdeck_site_images(self) -> dict[str, str]:
        return dict(self.site_images)

    def upperdeck_session(self) -> str | None:
        return self.container or None

    async def image_to_start(self) -> str:
        return await self.upperdeck_image()

    async def stop(self, now: bool = False) -> None:
        bound = Path(self.directory) / "bound"
        if bound.exists():
            self.save_on_stop_bound = float(bound.read_text())
        await super().stop(now=now)
