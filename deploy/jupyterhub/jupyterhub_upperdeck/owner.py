"""The manager's name of a user of the hub, which is also the owner of that user's sessions."""

from __future__ import annotations

import hashlib
import re
from typing import Any

# The name of a project of Harbor, which is a component of a repository's path (OCI distribution specification), too, as
# the agent requires of an owner.
_PROJECT = re.compile(r"[a-z0-9]+(?:[._-][a-z0-9]+)*")
# Separates the readable part from the hash; a name that contains it is hashed, too.
_MARK = "-sha-"
_MAX = 64
_HASH = 16
_STEM = 32

VARIABLE = "UPPERDECK_OWNER"
"""Variable of a server's environment with its owner, for the agent's rule ``--owner env:UPPERDECK_OWNER``."""


def owner_of(name: str) -> str:
    """Returns the manager's name of a user.

    It is the user's name where that can name a project of Harbor, at most 64 characters long. Any other name (with
    capital letters, ``@``, ``__``, other scripts) gets a readable part and 64 bits of its SHA-256, so that different
    users never have the same name.
    """
    if _PROJECT.fullmatch(name) and len(name) <= _MAX and _MARK not in name:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:_HASH]
    stem = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:_STEM].strip("-") or "user"
    return f"{stem}{_MARK}{digest}"


def owner(spawner: Any) -> str:
    """Returns the owner of a spawner's server, as a value of ``Spawner.environment``."""
    return owner_of(spawner.user.name)
