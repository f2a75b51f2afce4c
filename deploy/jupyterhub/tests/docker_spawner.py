"""DockerSpawner for the tests: servers on the network of this machine, which needs no rules of a firewall."""

from __future__ import annotations

from typing import Any

from jupyterhub.utils import random_port

from jupyterhub_upperdeck.docker import UpperdeckDockerSpawner


class HostNetworkSpawner(UpperdeckDockerSpawner):
    """What DockerSpawner's documentation says of the host's network."""

    async def start(self) -> Any:
        self.port = random_port()
        return await super().start()

    async def get_ip_and_port(self) -> tuple[str, int]:
        return "127.0.0.1", self.port
