"""The key with which the hub states a user's identity to the manager.

The private key belongs to the hub and its service alone. The manager has the public one, as a JSON Web Key Set.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterable
from pathlib import Path

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from jwt.algorithms import OKPAlgorithm

ISSUER = "jupyterhub-upperdeck"
AUDIENCE = "upperdeck"
LIFETIME_S = 60
"""How long a token is accepted. The manager looks at it once, when a request begins."""


class KeyProblem(Exception):
    """The key cannot be used; the text says why."""


def _key_id(key: Ed25519PrivateKey) -> str:
    public = key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return hashlib.sha256(public).hexdigest()[:16]


def key_set(keys: Iterable[Ed25519PrivateKey]) -> str:
    """Returns the public keys as a JSON Web Key Set (RFC 7517), for the manager's ``--jwks``."""
    found = []
    for key in keys:
        public = json.loads(OKPAlgorithm.to_jwk(key.public_key()))
        found.append({**public, "kid": _key_id(key), "alg": "EdDSA", "use": "sig"})
    return json.dumps({"keys": found}, indent=2) + "\n"


def make(directory: Path) -> tuple[Path, Path]:
    """Makes ``signing-key.pem`` (readable by its owner alone) and ``jwks.json``. Returns their paths.

    Fails if there is a key: the one in use is not replaced by accident.
    """
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    private, public = directory / "signing-key.pem", directory / "jwks.json"
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(private, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(pem)
    public.write_text(key_set([key]))
    return private, public


class Signer:
    """Makes tokens that say who a user is."""

    def __init__(self, key: Ed25519PrivateKey, issuer: str = ISSUER, audience: str = AUDIENCE) -> None:
        self._key = key
        self._id = _key_id(key)
        self._issuer = issuer
        self._audience = audience

    @classmethod
    def read(cls, path: Path, issuer: str = ISSUER, audience: str = AUDIENCE) -> Signer:
        """Reads the private key from a file.

        Fails with :class:`KeyProblem` if others may read the file, or it has no Ed25519 key.
        """
        try:
            mode = path.stat().st_mode & 0o777
            key = serialization.load_pem_private_key(path.read_bytes(), None)
        except (OSError, ValueError, TypeError) as error:
            raise KeyProblem(f"the signing key {path} cannot be read: {error}") from error
        if mode & 0o007:
            raise KeyProblem(f"any user of this machine can read the signing key {path}: chmod o= {path}")
        if not isinstance(key, Ed25519PrivateKey):
            raise KeyProblem(f"{path} has no Ed25519 key: make one with 'jupyterhub-upperdeck key DIRECTORY'")
        return cls(key, issuer, audience)

    def token(self, owner: str, *, groups: Iterable[str] = ()) -> str:
        """Returns a token for one request of ``owner``, the manager's name of a user."""
        now = int(time.time())
        claims = {
            "iss": self._issuer,
            "aud": self._audience,
            "sub": owner,
            "iat": now,
            "exp": now + LIFETIME_S,
            "jti": secrets.token_hex(8),
            "groups": sorted(groups),
        }
        return jwt.encode(claims, self._key, algorithm="EdDSA", headers={"kid": self._id})
