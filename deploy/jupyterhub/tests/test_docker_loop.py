"""DockerSpawner with a Docker daemon: its images and the saved ones, and the save on stop."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest

from lab import DockerLab, until
from person import Person, Session

NEEDED = ["dockerd", "docker", "skopeo", "docker-registry", "redis-server", "node", "debootstrap"]


@pytest.fixture(scope="module")
def lab() -> Iterator[DockerLab]:
    lacking = [name for name in NEEDED if shutil.which(name) is None]
    if os.geteuid() != 0 or lacking:
        reason = f"only root can run containers; not installed: {lacking}"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    made = DockerLab()
    yield made
    made.close()


def test_saved_on_stop_and_started_from_it(lab: DockerLab) -> None:
    alice, bob = Person(lab, "alice"), Person(lab, "bob")
    page = alice.spawn_page()
    assert 'value="Python"' in page and 'value="The same"' in page
    assert "My saved images" not in page
    alice.start(image="The same", upperdeck_save_on_stop=True)
    session = Session(lab, "alice")
    session.shell("/opt/venv/bin/pip install --quiet --no-index /var/tmp/upperdeck-hub-*/wheels/greeting*.whl")
    session.shell("echo kept > ~/note.txt")
    session.known()
    alice.stop()
    # With all that is in it. Docker removes it by itself, and says that it is stopped before that.
    until("the container is removed", lambda: not lab.engine("ps", "--all", "--quiet"))
    lab.forget_images()
    page = alice.spawn_page()
    assert "Last stop" in page and "Saved as jupyter-alice:" in page
    assert "added: greeting 1.0" in page
    korean = alice.spawn_page("ko-KR,ko;q=0.9")
    for text in ("내가 저장한 이미지", "마지막 종료", "추가됨: greeting 1.0", "서버가 멈출 때 이 환경을 저장합니다"):
        assert text in korean, korean
    alice.enter_portal()
    [image] = alice.portal("GET", "api/v1/images").json()["images"]
    key = page.split('value="saved-')[1].split('"')[0]
    assert f'value="saved-{key}" checked' in page, "the user goes on from there"
    # Another user's.
    references = [image["tags"][0]["reference"], f"{image['repository']}@{image['digest']}"]
    for named in (f"saved-{key}", *references):
        refused = bob.request_start(image=named)
        assert refused.status_code in (400, 403), (named, refused.text)
    # By the portal's link (--start-url).
    link = alice.http.get(f"{lab.hub}/hub/spawn", params={"image": references[0]}, timeout=60)
    assert "/hub/spawn-pending/" in link.url or "/user/alice/" in link.url, link.url
    until("the server of the link", alice.ready)
    session = Session(lab, "alice")
    assert session.shell("python3 -c 'import greeting; print(greeting.WORDS)'") == "hello from a package"
    assert session.shell("cat ~/note.txt") == "kept"
    assert lab.engine("inspect", "--format", "{{.Config.Image}}", session.container) == references[1]

    def start_codes() -> list[str]:
        judged = session.known()["start"]
        assert judged["starts"] is True, judged
        return [reason["code"] for reason in judged["reasons"]]

    # What starts it is looked for in its files, once these were read.
    # The image has a command and a user of its own; the hub sets another command.
    found = ["started_here", "program_there", "command_there", "user_there"]
    until("the program is found", lambda: "program_there" in start_codes())
    assert start_codes() == found
    # The choice is kept.
    session.known()
    alice.stop()
    names = [one["name"] for one in alice.portal("GET", "api/v1/images").json()["images"]]
    assert names == ["jupyter-alice", "jupyter-alice"]


def test_odd_names_of_images_are_refused(lab: DockerLab) -> None:
    carol = Person(lab, "carol")
    odd = [
        "saved-", "saved-" + "0" * 24, "../../x", "Python\n", "{username}", "\u202eevil", "x" * 100_000, "http://x/",
        "-v/:/host", ["Python"], {"Python": 1}, 7, True,
    ]  # fmt: skip
    for named in odd:
        refused = carol.request_start(image=named)
        assert refused.status_code in (400, 403), (str(named)[:50], refused.status_code, refused.text[:500])
        assert "jupyter-carol" not in lab.engine("ps", "--all", "--format", "{{.Names}}"), named
