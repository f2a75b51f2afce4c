"""Whether an image will start, by what the user changed."""

from typing import Any

import pytest

from jupyterhub_upperdeck.starting import judge_image, judge_packages, judge_session
from jupyterhub_upperdeck.words import words_in


def packages(*changes: tuple[str, str, str | None]) -> dict[str, Any]:
    return {
        "packages": [
            {"name": name, "change": change, "version": version, "manager": "pip", "location": "opt/venv"}
            for name, change, version in changes
        ],
        "more": 0,
    }


@pytest.mark.parametrize(
    ("changes", "starts", "codes"),
    [
        ([("numpy", "added", "2.1")], True, []),
        ([("jupyterhub", "removed", None)], False, ["jupyterhub_removed"]),
        ([("jupyter_server", "removed", None)], False, ["server_removed"]),
        ([("jupyterhub", "removed", None), ("jupyterhub", "added", "6.0")], True, []),
        ([("prometheus_client", "removed", None), ("Jinja2", "removed", None)], None, ["needed_removed"] * 2),
        ([("tornado", "changed", "6.5")], True, []),
        ([("jupyterhub", "changed", "4.1.5")], None, ["jupyterhub_version"]),
        ([("jupyterhub", "changed", "6.0.0")], True, []),
    ],
)
def test_packages_decide(changes: list[Any], starts: bool | None, codes: list[str]) -> None:
    judged = judge_packages(packages(*changes), "6.1.1")
    assert judged.starts is starts
    assert [reason.code for reason in judged.reasons] == codes


def program(name: str, path: str | None = None, mounted: bool = False) -> dict[str, Any]:
    return {"name": name, "path": path, "mounted": mounted}


def interpreted(name: str, path: str | None = None, mounted: bool = False) -> dict[str, Any]:
    return {**program("start.sh", "/opt/start.sh"), "interpreter": program(name, path, mounted)}


@pytest.mark.parametrize(
    ("programs", "starts", "codes"),
    [
        ([program("tini", "/usr/bin/tini"), program("x", "/opt/x")], True, ["program_there", "program_there"]),
        ([program("tini", "/usr/bin/tini"), program("x")], False, ["program_there", "program_missing"]),
        ([program("x", mounted=True)], True, ["program_mounted"]),
        ([interpreted("/bin/sh", "/bin/sh")], True, ["program_there"]),
        ([interpreted("python3")], False, ["program_there", "interpreter_missing"]),
        ([interpreted("python3", mounted=True)], True, ["program_there", "interpreter_mounted"]),
        ([{**program("x", "/opt/x"), "interpreter": "odd"}], True, ["program_there"]),
        # The image's own command, which the hub does not use.
        ([{**program("x", "/opt/x"), "image_only": True}], True, ["command_there"]),
        ([{**program("x"), "image_only": True}], None, ["command_missing"]),
        ([{**program("x", mounted=True), "image_only": True}], True, ["command_mounted"]),
        ([{**interpreted("python3"), "image_only": True}], None, ["command_there", "interpreter_missing"]),
        ([{**program("x"), "image_only": True}, program("y")], False, ["command_missing", "program_missing"]),
        (["odd"], True, []),
    ],
)
def test_programs_decide(programs: list[Any], starts: bool, codes: list[str]) -> None:
    judged = judge_packages({**packages(), "programs": programs}, "6.1.1")
    assert judged.starts is starts
    assert [reason.code for reason in judged.reasons] == codes
    # What the form says of it is what is against it.
    assert [reason.code for reason in judged.against] == [code for code in codes if code.endswith("_missing")]
    assert all(reason.sentence(words_in(language)) for reason in judged.reasons for language in ("en", "ko"))


def user(missing: bool = False, mounted: bool = False, **more: str) -> dict[str, Any]:
    return {"name": "jovyan", "missing": missing, "mounted": mounted, "home": None, "shell": None, **more}


@pytest.mark.parametrize(
    ("found", "starts", "said"),
    [
        (user(missing=True), None, "The user jovyan, by which the image starts, is not in its /etc/passwd"),
        (user(mounted=True), True, "/etc/passwd is mounted"),
        (user(home="/home/jovyan", shell="/bin/bash"), True, "directory /home/jovyan and the shell /bin/bash"),
        # A number.
        (user(), True, ""),
        (None, True, ""),
        ("odd", True, ""),
    ],
)
def test_the_user_decides(found: Any, starts: bool | None, said: str) -> None:
    judged = judge_packages({**packages(), "user": found}, "6.1.1")
    assert judged.starts is starts
    assert said in "".join(reason.sentence() for reason in judged.reasons)
    gone = judge_packages({**packages(), "user": user(missing=True), "programs": [program("x")]})
    assert gone.starts is False


def test_an_unknown_list_decides_nothing() -> None:
    assert judge_packages(None).starts is None
    assert judge_packages(None).against == ()


@pytest.mark.parametrize(
    ("kind", "found", "starts", "against"),
    [
        ("jupyter", packages(), True, []),
        # It was saved elsewhere, or before the manager wrote it down.
        ("", packages(), True, []),
        ("rstudio", packages(), None, ["other_kind"]),
        ("other", None, None, ["other_kind"]),
        ("rstudio", {**packages(), "programs": [program("jupyterhub-singleuser", "/opt/x")]}, True, []),
        ("other", packages(("jupyterhub", "removed", None)), False, ["jupyterhub_removed", "other_kind"]),
        ("jupyter", packages(("jupyterhub", "changed", "4.1.5")), None, ["jupyterhub_version"]),
    ],
)
def test_what_an_image_was_saved_from_decides(
    kind: str, found: dict[str, Any] | None, starts: bool | None, against: list[str]
) -> None:
    judged = judge_image(kind, found, "6.1.1")
    assert judged.starts is starts
    assert [reason.code for reason in judged.against] == against


def test_a_session_says_why() -> None:
    session = {
        "image": "quay.io/base:1",
        "unsaved": [
            {"path": "/home/jovyan", "kind": "nfs4", "data": True},
            {"path": "/proc", "kind": "proc", "data": False},
        ],
    }
    judged = judge_session(session, packages(), hub_version="6.1.1", home="/home/jovyan")
    assert judged.starts is True
    assert [reason.code for reason in judged.reasons] == ["started_here", "home_on_volume"]
    assert "quay.io/base:1" in judged.reasons[0].sentence()
    broken = judge_session(session, packages(("jupyterhub", "removed", None)), hub_version="6.1.1")
    assert broken.starts is False
    assert "started_here" not in [reason.code for reason in broken.reasons]
    assert judge_session({**session, "problem": "it is gone"}, packages(), hub_version="6.1.1").starts is None
