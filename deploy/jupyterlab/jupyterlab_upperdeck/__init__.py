"""The part of the extension in the Jupyter server: passes the page's calls to the hub's service."""

from __future__ import annotations

from typing import Any

from .handlers import handlers

__version__ = "0.1.0"


def _jupyter_labextension_paths() -> list[dict[str, str]]:
    return [{"src": "labextension", "dest": "jupyterlab-upperdeck"}]


def _jupyter_server_extension_points() -> list[dict[str, str]]:
    return [{"module": "jupyterlab_upperdeck"}]


def _load_jupyter_server_extension(server: Any) -> None:
    """Adds the handlers to a server."""
    server.web_app.add_handlers(".*$", handlers(server.web_app.settings["base_url"]))
