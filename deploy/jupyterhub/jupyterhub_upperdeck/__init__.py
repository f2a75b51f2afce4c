"""Start servers of JupyterHub from saved sessions, and save them when they stop.

The spawners are in :mod:`jupyterhub_upperdeck.kube` and :mod:`jupyterhub_upperdeck.docker`, which need KubeSpawner and
DockerSpawner.
"""

from .configure import configure
from .owner import owner, owner_of
from .profiles import profile_list
from .spawner import ImageForm, UpperdeckMixin

__all__ = ["ImageForm", "UpperdeckMixin", "configure", "owner", "owner_of", "profile_list"]
