"""All settings of a hub without Kubernetes, in one call."""

from __future__ import annotations

import sys
from typing import Any


def configure(
    c: Any,
    *,
    manager_url: str,
    signing_key: str,
    target: str,
    service_url: str = "http://127.0.0.1:10101",
    sessions_reach: str | None = None,
    name: str = "upperdeck",
) -> None:
    """Adds the service, its rights and the spawner's settings to a ``jupyterhub_config.py``.

    `manager_url`: where hub and service reach the manager. `signing_key`: the file that ``jupyterhub-upperdeck key``
    made. `target`: the manager's ``--target``. `service_url`: where the hub's proxy reaches the service.
    `sessions_reach`: where servers reach it, with the prefix; by default `service_url` with it.

    The spawner class is set separately.
    """
    prefix = f"/services/{name}/"
    base = str(c.JupyterHub.get("base_url", "/")) if "base_url" in c.JupyterHub else "/"
    c.JupyterHub.services = [
        *(c.JupyterHub.services if "services" in c.JupyterHub else []),
        {
            "name": name,
            "url": service_url,
            "command": [sys.executable, "-m", "jupyterhub_upperdeck", "serve"],
            "environment": {"UPPERDECK_MANAGER_URL": manager_url, "UPPERDECK_SIGNING_KEY_FILE": signing_key},
            "oauth_no_confirm": True,
            "display": True,
        },
    ]
    c.JupyterHub.load_roles = [
        *(c.JupyterHub.load_roles if "load_roles" in c.JupyterHub else []),
        # Which container a server runs in is in the state that its spawner keeps.
        {
            "name": name,
            "services": [name],
            "scopes": ["read:users:name", "read:servers", "admin:server_state"],
        },
        {"name": "user", "scopes": ["self", f"access:services!service={name}"]},
    ]
    settings = c.UpperdeckMixin
    settings.upperdeck_manager_url = manager_url
    settings.upperdeck_signing_key = signing_key
    settings.upperdeck_target = target
    settings.upperdeck_service = name
    settings.upperdeck_service_url = sessions_reach or service_url.rstrip("/") + base.rstrip("/") + prefix
