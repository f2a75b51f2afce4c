"""Whether a saved image will start on a hub, and why.

A save changes the files of a session's image and nothing else: user, command and environment stay as they are in the
base, from which the hub started this session. What can keep the new image from starting is what the user changed: the
programs by which a server is started, their interpreters, and the entry of the image's user in ``/etc/passwd``, which
the agent looks for in the session's files, and packages.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from .text import shorten
from .words import Words, english

Json = dict[str, Any]

_SERVERS = ("jupyterlab", "jupyter-server", "notebook")
# What JupyterHub (from 5 on) and Jupyter Server (from 2 on) both need, or one of them to start at all.
_NEEDED = (
    "alembic", "anyio", "jinja2", "jupyter-client", "jupyter-core", "jupyter-events", "nbformat", "packaging",
    "prometheus-client", "pyzmq", "send2trash", "sqlalchemy", "tornado", "traitlets", "websocket-client",
)  # fmt: skip
_SINGLEUSER = "jupyterhub-singleuser"


@dataclass(frozen=True)
class Reason:
    """A reason: its name among the words, and its values. `against`: it is one not to start."""

    code: str
    values: dict[str, str] = field(default_factory=dict, hash=False)
    against: bool = True

    def sentence(self, words: Words = english) -> str:
        """Returns it for people."""
        return words(self.code, **self.values)


@dataclass(frozen=True)
class Judgement:
    """`starts`: whether the image will start; `None` if that is not known."""

    starts: bool | None
    reasons: tuple[Reason, ...] = ()

    @property
    def against(self) -> tuple[Reason, ...]:
        """The reasons for which it may not start."""
        return tuple(reason for reason in self.reasons if reason.against)

    def as_json(self) -> Json:
        reasons = [
            {"code": reason.code, "detail": reason.sentence(), "values": reason.values} for reason in self.reasons
        ]
        return {"starts": self.starts, "reasons": reasons}


def _canonical(name: object) -> str:
    return re.sub(r"[-_.]+", "-", str(name)).lower()


def _major(version: object) -> int | None:
    found = re.match(r"\d+", str(version or ""))
    return int(found.group()) if found else None


def judge_packages(packages: Json | None, hub_version: str | None = None) -> Judgement:
    """Judges by the packages that were added to the base, removed from it, or changed."""
    if packages is None:
        return Judgement(None, (Reason("packages_unknown", against=False),))
    # (location, name): an environment that lost the hub's package is not mended by another that has it.
    changes = [
        (_canonical(one.get("name", "")), one)
        for one in packages.get("packages", [])
        if isinstance(one, dict) and one.get("manager") in ("pip", "conda")
    ]
    reasons: list[Reason] = []
    starts: bool | None = True
    removed = {name for name, one in changes if one.get("change") == "removed"}
    present = {name for name, one in changes if one.get("change") != "removed"}
    if "jupyterhub" in removed - present:
        starts = False
        reasons.append(Reason("jupyterhub_removed"))
    for name in _SERVERS:
        if name in removed - present:
            starts = False
            reasons.append(Reason("server_removed", {"name": name}))
    # Perhaps that of another environment than the server's.
    for name in sorted(set(_NEEDED) & (removed - present)):
        starts = starts and None
        reasons.append(Reason("needed_removed", {"name": name}))
    for name, one in changes:
        if name != "jupyterhub" or one.get("change") == "removed" or hub_version is None:
            continue
        version, hub = _major(one.get("version")), _major(hub_version)
        if version is not None and hub is not None and version != hub:
            values = {"version": shorten(one.get("version"), 40), "hub": shorten(hub_version, 40)}
            reasons.append(Reason("jupyterhub_version", values))
            starts = starts and None
    for judged in (_judge_programs(packages), _judge_user(packages.get("user"))):
        reasons += judged.reasons
        starts = _both(starts, judged.starts)
    return Judgement(starts, tuple(reasons))


def _both(one: bool | None, other: bool | None) -> bool | None:
    """Returns whether an image starts for which both hold."""
    return False if False in (one, other) else None if None in (one, other) else True


def _judge_programs(packages: Json) -> Judgement:
    """Judges by the programs by which the session was started. An agent of an earlier version names none."""
    reasons: list[Reason] = []
    starts: bool | None = True
    for one in packages.get("programs", []):
        if not isinstance(one, dict):
            continue
        found = [_judge_program(one)]
        if isinstance(interpreter := one.get("interpreter"), dict):
            found += _judge_interpreter(one, interpreter)
        reasons += found
        if any(reason.against for reason in found):
            # A hub that started the session by another command does so again.
            starts = _both(starts, None if one.get("image_only") else False)
    return Judgement(starts, tuple(reasons))


def _judge_program(one: Json) -> Reason:
    kind = "command" if one.get("image_only") else "program"
    values = {"name": shorten(one.get("name", ""), 80)}
    if one.get("path"):
        return Reason(f"{kind}_there", {**values, "path": shorten(one["path"])}, against=False)
    if one.get("mounted"):
        return Reason(f"{kind}_mounted", values, against=False)
    return Reason(f"{kind}_missing", values)


def _judge_interpreter(program: Json, interpreter: Json) -> list[Reason]:
    values = {"name": shorten(program.get("name", ""), 80), "interpreter": shorten(interpreter.get("name", ""))}
    if interpreter.get("path"):
        return []
    if interpreter.get("mounted"):
        return [Reason("interpreter_mounted", values, against=False)]
    return [Reason("interpreter_missing", values)]


def _judge_user(user: Any) -> Judgement:
    """Judges by the user of the image's config: a name without an entry is refused where the hub sets no other user."""
    if not isinstance(user, dict):
        return Judgement(True)
    name = shorten(user.get("name", ""), 80)
    if user.get("missing"):
        return Judgement(None, (Reason("user_missing", {"name": name}),))
    if user.get("mounted"):
        return Judgement(True, (Reason("user_mounted", {"name": name}, against=False),))
    if user.get("home") is None:
        return Judgement(True)
    values = {"name": name, "home": shorten(user["home"]), "shell": shorten(user.get("shell", ""))}
    return Judgement(True, (Reason("user_there", values, against=False),))


def judge_image(kind: str, packages: Json | None, hub_version: str | None) -> Judgement:
    """Judges a saved image, of which the manager knows the `kind` of its session ("" if it does not)."""
    judged = judge_packages(packages, hub_version)
    programs = [one.get("name") for one in (packages or {}).get("programs", []) if isinstance(one, dict)]
    # RStudio may well have been started by a hub.
    if kind in ("", "jupyter") or _SINGLEUSER in programs:
        return judged
    return Judgement(judged.starts and None, (*judged.reasons, Reason("other_kind")))


def judge_session(
    session: Json, packages: Json | None, *, hub_version: str | None, home: str | None = None
) -> Judgement:
    """Judges an image that would be saved now from a running server of the hub.

    `session` is the manager's view of it, `home` its home directory, if known.
    """
    by_packages = judge_packages(packages, hub_version)
    reasons: list[Reason] = []
    starts = by_packages.starts
    if session.get("problem"):
        problem = shorten(session["problem"], 300)
        reasons.append(Reason("session_problem", {"problem": problem}))
        starts = None
    base = shorten(session.get("image") or "its base", 200)
    if starts is not False:
        reasons.append(Reason("started_here", {"base": base}, against=False))
    reasons += by_packages.reasons
    if starts is None and packages is None:
        # Without the list, what is known is that the base started here.
        starts = None if session.get("problem") else True
    kept = [str(mount.get("path", "")) for mount in session.get("unsaved", []) if mount.get("data")]
    for place in kept:
        if home and (home == place or home.startswith(place.rstrip("/") + "/")):
            reasons.append(Reason("home_on_volume", {"path": shorten(place)}, against=False))
    return Judgement(starts, tuple(reasons))
