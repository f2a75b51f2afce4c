"""Whose a token is, and the key that the manager trusts."""

import json
from pathlib import Path

import jwt
import pytest

from jupyterhub_upperdeck.hub import has_server_scope, server_of
from jupyterhub_upperdeck.keys import AUDIENCE, ISSUER, LIFETIME_S, KeyProblem, Signer, make
from jupyterhub_upperdeck.service import place


@pytest.mark.parametrize(
    ("name", "scopes", "server"),
    [
        ("alice", ["access:servers!server=alice/", "users:activity!user=alice"], ""),
        ("alice", ["access:servers!server=alice/gpu"], "gpu"),
        # Given to another user: it is a visitor's, not the server's.
        ("bob", ["access:servers!server=alice/"], None),
        ("bob", ["access:servers!server=alice/", "access:servers!server=bob/x"], "x"),
        # A name that begins like another.
        ("al", ["access:servers!server=alice/"], None),
        # Of no certain server.
        ("alice", ["access:servers!server=alice/", "access:servers!server=alice/gpu"], None),
        ("alice", ["access:servers!user=alice"], None),
        ("alice", ["access:services!service=upperdeck"], None),
        ("alice", [], None),
    ],
)
def test_a_token_says_which_server_it_is_of(name: str, scopes: list[str], server: str | None) -> None:
    model = {"name": name, "scopes": scopes}
    assert server_of(model) == server
    # Whatever it is of, it does not get a user's rights.
    assert has_server_scope(model) is any("!server=" in scope for scope in scopes)


def test_the_manager_can_verify_what_the_hub_signs(tmp_path: Path) -> None:
    private, public = make(tmp_path)
    assert private.stat().st_mode & 0o777 == 0o600
    [key] = json.loads(public.read_text())["keys"]
    assert "d" not in key, "the private part is not in the key set"
    token = Signer.read(private).token("alice", groups=["b", "a"])
    claims = jwt.decode(token, jwt.PyJWK(key), algorithms=["EdDSA"], issuer=ISSUER, audience=AUDIENCE)
    assert (claims["sub"], claims["groups"]) == ("alice", ["a", "b"])
    assert claims["exp"] - claims["iat"] == LIFETIME_S
    assert jwt.get_unverified_header(token)["kid"] == key["kid"]


def test_a_key_is_not_replaced_and_not_open_to_all(tmp_path: Path) -> None:
    private, _ = make(tmp_path)
    with pytest.raises(FileExistsError):
        make(tmp_path)
    private.chmod(0o644)
    with pytest.raises(KeyProblem, match="chmod o="):
        Signer.read(private)
    private.chmod(0o600)
    private.write_text("no key")
    with pytest.raises(KeyProblem, match="cannot be read"):
        Signer.read(private)


def test_a_service_by_name_is_listened_for_on_all_addresses() -> None:
    assert place("http://127.0.0.1:10101/x/", None) == ("127.0.0.1", 10101)
    assert place("http://hub:10101", None) == ("0.0.0.0", 10101)
    assert place("http://hub:10101", "[::1]:7") == ("::1", 7)
