"""Whether a saved image will start on a hub, and why.

A save changes the files of a session's image and nothing else: user, command and environment stay as they are in the
base, from which the hub started this session. What can keep the new image from starting is what the user changed.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any

from .text import shorten

Json = dict[str, Any]

_SERVERS = ("jupyterlab", "jupyter-server", "notebook")


@dataclass(frozen=True)
class Reason:
    """A reason, for programs (`code`) and for people (`detail`, English). `values` are its parts."""

    code: str
    detail: str
    values: dict[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Judgement:
    """`starts`: whether the image will start; `None` if that is not known."""

    starts: bool | None
    reasons: tuple[Reason, ...] = ()

    def as_json(self) -> Json:
        return {"starts": self.starts, "reasons": [asdict(reason) for reason in self.reasons]}


def _canonical(name: object) -> str:
    return re.sub(r"[-_.]+", "-", str(name)).lower()


def _major(version: object) -> int | None:
    found = re.match(r"\d+", str(version or ""))
    return int(found.group()) if found else None


def judge_packages(packages: Json | None, hub_version: str | None = None) -> Judgement:
    """Judges by the packages that were added to the base, removed from it, or changed."""
    if packages is None:
        return Judgement(None, (Reason("packages_unknown", "The list of packages is not known."),))
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
        reasons.append(
            Reason(
                "jupyterhub_removed",
                "The package jupyterhub was removed, which the command jupyterhub-singleuser is part of.",
            )
        )
    for name in _SERVERS:
        if name in removed - present:
            starts = False
            reasons.append(Reason("server_removed", f"The package {name} was removed.", {"name": name}))
    for name, one in changes:
        if name != "jupyterhub" or one.get("change") == "removed" or hub_version is None:
            continue
        version, hub = _major(one.get("version")), _major(hub_version)
        if version is not None and hub is not None and version != hub:
            values = {"version": shorten(one.get("version"), 40), "hub": shorten(hub_version, 40)}
            reasons.append(
                Reason(
                    "jupyterhub_version",
                    f"jupyterhub {values['version']} was installed, and the hub has {values['hub']}: "
                    "releases with different first numbers may not work together.",
                    values,
                )
            )
            starts = starts and None
    return Judgement(starts, tuple(reasons))


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
        reasons.append(Reason("session_problem", problem, {"problem": problem}))
        starts = None
    base = shorten(session.get("image") or "its base", 200)
    if starts is not False:
        reasons.append(
            Reason(
                "started_here",
                f"This hub started this session from {base}, whose user and command the image keeps.",
                {"base": base},
            )
        )
    reasons += by_packages.reasons
    if starts is None and packages is None:
        # Without the list, what is known is that the base started here.
        starts = None if session.get("problem") else True
    kept = [str(mount.get("path", "")) for mount in session.get("unsaved", []) if mount.get("data")]
    for place in kept:
        if home and (home == place or home.startswith(place.rstrip("/") + "/")):
            reasons.append(
                Reason(
                    "home_on_volume",
                    f"The home directory is on the volume at {shorten(place)}: it is not in the image, and is there "
                    "at the next start only if the hub mounts it again.",
                    {"path": shorten(place)},
                )
            )
    return Judgement(starts, tuple(reasons))
