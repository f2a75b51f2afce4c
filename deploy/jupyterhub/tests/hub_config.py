"""The hub of the tests; `LAB` in the environment is a JSON object with its places."""

import json
import os

from jupyterhub_upperdeck import configure

lab = json.loads(os.environ["LAB"])

c = get_config()  # noqa: F821
c.JupyterHub.bind_url = f"http://127.0.0.1:{lab['hub_port']}"
c.JupyterHub.hub_bind_url = f"http://127.0.0.1:{lab['hub_api_port']}"
c.JupyterHub.db_url = f"sqlite:///{lab['directory']}/hub.sqlite"
c.JupyterHub.cookie_secret_file = f"{lab['directory']}/cookie-secret"
c.ConfigurableHTTPProxy.command = lab["proxy"]
c.ConfigurableHTTPProxy.pid_file = f"{lab['directory']}/proxy.pid"
c.ConfigurableHTTPProxy.api_url = f"http://127.0.0.1:{lab['proxy_api_port']}"
c.ConfigurableHTTPProxy.auth_token = lab["proxy_token"]
c.JupyterHub.authenticator_class = "dummy"
c.DummyAuthenticator.password = lab["password"]
c.Authenticator.allow_all = True
c.JupyterHub.allow_named_servers = True
c.JupyterHub.cleanup_servers = True
# Only the culler of the test, which asks once.
c.JupyterHub.services = [{"name": "culler", "api_token": lab["culler_token"]}]
c.JupyterHub.load_roles = [
    {
        "name": "culler",
        "services": ["culler"],
        "scopes": ["list:users", "read:users:activity", "read:servers", "delete:servers"],
    },
]
c.Spawner.cmd = ["python3", "-m", "jupyterhub.singleuser"]
c.Spawner.default_url = "/lab"
c.Spawner.http_timeout = 120
c.Spawner.start_timeout = 180
c.UpperdeckMixin.save_on_stop_bound = lab["bound"]
if lab["engine"] == "docker":
    os.environ["DOCKER_HOST"] = lab["engine_environment"]["DOCKER_HOST"]
    c.JupyterHub.spawner_class = "docker_spawner.HostNetworkSpawner"
    c.DockerSpawner.image = lab["image"]
    c.DockerSpawner.allowed_images = {"Python": lab["image"], "The same": lab["image"]}
    c.DockerSpawner.network_name = "host"
    # No port is published.
    c.DockerSpawner.use_internal_ip = True
    c.DockerSpawner.volumes = {mount: {"bind": mount, "mode": "ro"} for mount in lab["mounts"]}
    c.DockerSpawner.environment = lab["container_environment"]
    c.DockerSpawner.remove = True
else:
    c.JupyterHub.spawner_class = "podman_spawner.PodmanSpawner"
    c.PodmanSpawner.image = lab["image"]
    c.PodmanSpawner.site_images = {"Python": lab["image"]}
    c.PodmanSpawner.podman_environment = lab["engine_environment"]
    c.PodmanSpawner.mounts = lab["mounts"]
    c.PodmanSpawner.container_environment = lab["container_environment"]
    c.PodmanSpawner.directory = lab["directory"]

configure(
    c,
    manager_url=lab["manager_url"],
    signing_key=lab["signing_key"],
    target=lab["target"],
    service_url=f"http://127.0.0.1:{lab['service_port']}",
)
