"""The whole loop with its real parts: save in JupyterLab, stop, start from the save; another user; stop and cull."""

from __future__ import annotations

import base64
import hmac
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from selenium.webdriver.common.keys import Keys

from browser import Browser
from jupyterhub_upperdeck import owner_of
from lab import Daemon, Lab, until
from person import PASSWORD, Person, Session

README = Path(__file__).parents[1] / "README.md"
NEEDED = ["podman", "skopeo", "docker-registry", "redis-server", "chromium", "chromedriver", "node", "debootstrap"]
# A name that is no component of a repository's path.
BOB = "bob@example.org"


def missing() -> str | None:
    if os.geteuid() != 0:
        return "only root can run containers and the agent"
    lacking = [name for name in NEEDED if shutil.which(name) is None]
    return f"not installed: {', '.join(lacking)}" if lacking else None


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    if reason := missing():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    made = Lab()
    yield made
    made.close()


@pytest.fixture(scope="module")
def browser(lab: Lab) -> Iterator[Browser]:
    made = Browser(lab.directory / "chromium")
    yield made
    made.close()


@pytest.fixture(scope="module")
def alice(lab: Lab) -> Person:
    return Person(lab, "alice")


@pytest.fixture(scope="module")
def bob(lab: Lab) -> Person:
    return Person(lab, BOB)


def enter(browser: Browser, lab: Lab, name: str) -> None:
    """Logs in."""
    browser.go(f"{lab.hub}/hub/login")
    browser.write("#username_input", name)
    browser.write("#password_input", PASSWORD)
    browser.click("#login_submit")
    until("the login", lambda: "/hub/login" not in browser.driver.current_url)


def has_httr2() -> bool:
    """Returns whether R can run what the documentation has for it. It is in no image of the tests."""
    if shutil.which("Rscript") is None:
        return False
    looked = subprocess.run(["Rscript", "-e", "library(httr2)"], capture_output=True, check=False)
    return looked.returncode == 0


def signed_with_a_text(claims: dict[str, Any], secret: str) -> str:
    """Returns a token with HS256 and a public text as its secret, which jwt itself refuses to make."""

    def encode(data: bytes) -> str:
        return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

    head = encode(b'{"alg":"HS256","typ":"JWT"}') + "." + encode(json.dumps(claims).encode())
    return f"{head}.{encode(hmac.digest(secret.encode(), head.encode(), 'sha256'))}"


class TestLoop:
    """The tests follow each other: each goes on from where the one before ended."""

    def test_saved_in_lab(self, lab: Lab, browser: Browser) -> None:
        enter(browser, lab, "alice")
        browser.go(f"{lab.hub}/hub/spawn")
        browser.see("Server Options")
        browser.shot("01-spawn-page-first")
        browser.click("#spawn_form button[type=submit]")
        browser.find("#jp-upperdeck-top button, #jp-upperdeck-top jp-button")
        session = Session(lab, "alice")
        browser.click_text(".jp-toast-button, .jp-Notification-Toast button", "No")
        browser.find(".jp-LauncherCard")
        browser.shot("02-lab-with-button")
        # In its terminal, as a user does.
        browser.click_text(".jp-LauncherCard", "Terminal")
        browser.click(".jp-Terminal .xterm-screen")
        # The shell sets the title of the tab; what is written before it has begun is lost.
        browser.see("researcher@")
        wheel = "/var/tmp/upperdeck-hub-*/wheels/greeting*.whl"
        install = f"/opt/venv/bin/pip install --no-index {wheel} && echo kept > ~/note.txt"
        browser.find(".jp-Terminal")
        browser.type(".xterm-helper-textarea", install + Keys.ENTER)
        until("the package is installed", lambda: "note.txt" in session.shell("ls ~"))
        browser.shot("03-pip-in-the-terminal")
        assert session.known()["start"]["starts"] is True
        browser.click("#jp-upperdeck-top button, #jp-upperdeck-top jp-button")
        browser.see("What will not be in it")
        browser.see("This image will start on this hub.")
        browser.shot("04-dialog")
        browser.write(".jp-upperdeck-dialog input", "analysis")
        browser.write(".jp-upperdeck-dialog textarea", "{{ 7 * 7 }} <b>monday</b>")
        # What the bar shows is kept by the page itself: a save of a small change is over within moments.
        browser.run(
            "window.seen = []; const bar = document.querySelector('.jp-upperdeck-status');"
            "new MutationObserver(() => seen.push([bar.innerText.trim(), bar.querySelector('progress').value]))"
            ".observe(bar, { subtree: true, childList: true, attributes: true, characterData: true });"
        )
        browser.click_text(".jp-Dialog-button", "Save")
        browser.find(".jp-upperdeck-status progress")
        browser.shot("05-status-bar")
        browser.see("Start from it next time.")
        browser.shot("06-notification")
        seen = browser.run("return window.seen")
        assert any("%" in text or "Waiting" in text or "Saving" in text for text, _ in seen), seen
        browser.click(".lm-TabBar-tab[title='Saved environments'], .lm-TabBar-tab[data-id=jp-upperdeck-panel]")
        browser.see("My saves")
        browser.see("{{ 7 * 7 }} <b>monday</b>")
        browser.shot("07-side-panel")
        wrong = browser.errors()
        assert wrong == [], wrong

    def test_started_from_the_save(self, lab: Lab, browser: Browser, alice: Person) -> None:
        alice.stop()
        lab.forget_images()
        assert lab.engine("ps", "--all", "--quiet") == ""
        browser.go(f"{lab.hub}/hub/spawn")
        browser.see("My saved images")
        # Another's text in the hub's template: it is text.
        browser.see("{{ 7 * 7 }} <b>monday</b>")
        browser.see("added: greeting 1.0")
        browser.shot("08-spawn-page-with-save")
        browser.dark()
        browser.see("My saved images")
        browser.shot("08-spawn-page-dark")
        browser.dark(False)
        browser.narrow()
        browser.see("My saved images")
        browser.shot("08-spawn-page-narrow")
        assert not browser.overflows()
        browser.narrow(False)
        browser.speak("ko-KR")
        browser.see("내가 저장한 이미지")
        browser.see("추가됨: greeting 1.0")
        browser.shot("08-spawn-page-korean")
        browser.speak("en-GB")
        browser.click_text("#upperdeck-images label", "analysis")
        browser.click("#upperdeck_save_on_stop")
        browser.shot("09-spawn-page-chosen")
        browser.click("#spawn_form button[type=submit]")
        browser.find("#jp-upperdeck-top button, #jp-upperdeck-top jp-button")
        session = Session(lab, "alice")
        assert session.shell("python3 -c 'import greeting; print(greeting.WORDS)'") == "hello from a package"
        assert session.shell("cat ~/note.txt") == "kept"
        browser.find(".jp-DirListing-item[title^='Name: note.txt']")
        browser.shot("10-lab-from-the-save")
        browser.speak("ko-KR")
        browser.click("#jp-upperdeck-top button, #jp-upperdeck-top jp-button")
        browser.see("저장되지 않는 것")
        browser.see("이 이미지는 이 허브에서 시작됩니다.")
        browser.shot("10-lab-in-korean")
        browser.click_text(".jp-Dialog-button", "취소")
        browser.speak("en-GB")
        # Lab's own dark theme.
        browser.find(".jp-upperdeck-top")
        browser.click_text(".lm-MenuBar-itemLabel", "Settings")
        browser.click_text(".lm-Menu-itemLabel", "Theme")
        browser.click_text(".lm-Menu-itemLabel", "JupyterLab Dark")
        until("the dark theme", lambda: browser.run("return document.body.dataset.jpThemeLight") == "false")
        browser.click("#jp-upperdeck-top button, #jp-upperdeck-top jp-button")
        browser.see("What will not be in it")
        browser.shot("10-lab-dark")
        browser.narrow()
        browser.shot("10-lab-narrow")
        browser.narrow(False)
        browser.click_text(".jp-Dialog-button", "Cancel")
        browser.click(".lm-TabBar-tab[title='Saved environments'], .lm-TabBar-tab[data-id=jp-upperdeck-panel]")
        browser.see("My saves")
        browser.shot("10-panel-dark")

    def test_the_portal_behind_the_hub(self, lab: Lab, browser: Browser) -> None:
        browser.go(f"{lab.hub}/services/upperdeck/")
        browser.see("analysis")
        browser.shot("11-portal")
        wrong = browser.errors()
        assert wrong == [], wrong

    def test_the_session_saves_itself_with_its_own_token(self, lab: Lab) -> None:
        """The documented requests, as they are printed, with the session's variables, and no right beside them."""
        session = Session(lab, "alice")
        # What was started from a saved image is a version of that, unless it is named.
        assert session.known()["session"]["suggested_name"] == "analysis"
        text = README.read_text()
        kept = ("JUPYTERHUB_API_TOKEN", "UPPERDECK_SERVICE_URL")
        variables = {"PATH": os.environ["PATH"], **{name: session.environment[name] for name in kept}}
        [curl] = re.findall(r"```\n(curl .*?)```", text, re.DOTALL)
        [r] = re.findall(r"```r\n(.*?)```", text, re.DOTALL)
        requests_of = [("curl", ["bash", "-c", curl])]
        if has_httr2():
            requests_of.append(("R", ["Rscript", "-e", r]))
        for language, words in requests_of:
            said = subprocess.run(words, env=variables, capture_output=True, text=True, check=False)
            assert said.returncode == 0 and '"queued"' in said.stdout, (language, said)
            until("its end", lambda: session.call("GET").json()["save"]["state"] == "succeeded")
        images = session.call("GET", "session/images").json()["images"]
        assert [one["name"] for one in images] == ["model", "course", "analysis"][-1 - len(requests_of) :]
        assert images[-2]["message"] == "after the first day"
        for method, where in [
            ("GET", "api/v1/images"),
            ("GET", "api/v1/sessions"),
            ("DELETE", "api/v1/images/analysis/tags/x"),
            ("POST", "api/v1/saves"),
        ]:
            assert session.call(method, where).status_code == 403, where
        assert session.call("POST", "session/saves", json={"session": "another"}).status_code == 422

    def test_another_user_sees_and_starts_nothing_until_it_is_shared(
        self, lab: Lab, alice: Person, bob: Person
    ) -> None:
        alice.enter_portal()
        bob.enter_portal()
        [image] = [one for one in alice.portal("GET", "api/v1/images").json()["images"] if one["name"] == "analysis"]
        key = next(
            one["key"] for one in Session(lab, "alice").call("GET", "session/images").json()["images"]
            if one["name"] == "analysis"
        )  # fmt: skip
        digest, tag = image["digest"], image["tags"][0]
        where = f"api/v1/images/analysis/digests/{digest}"
        assert bob.portal("GET", "api/v1/images").json()["images"] == []
        assert "analysis" not in bob.spawn_page()
        assert bob.request_start(image=key).status_code in (400, 403)
        for text in (tag["reference"], f"{image['repository']}@{digest}"):
            refused = bob.request_start(image=text)
            assert refused.status_code == 403 and "no such saved image" in refused.text, refused.text
        assert bob.portal("GET", where + "?user=alice").status_code in (403, 404)
        shared = alice.portal("PATCH", where, json={"shared": [owner_of(BOB)]})
        assert shared.status_code == 200, shared.text
        page = bob.spawn_page()
        assert "Shared with me" in page and "added: greeting 1.0" in page
        bob.start(image=key, upperdeck_save_on_stop=True)
        session = Session(lab, BOB)
        assert session.shell("python3 -c 'import greeting; print(greeting.WORDS)'") == "hello from a package"
        assert session.known()["owner"] == owner_of(BOB)
        for method, place, body in [
            ("PATCH", where, {"description": "mine"}),
            ("DELETE", f"api/v1/images/analysis/tags/{tag['name']}", None),
            ("DELETE", where, None),
            ("POST", f"api/v1/images/analysis/tags/{tag['name']}", {"tag": "mine"}),
        ]:
            answer = bob.portal(method, place, json=body)
            assert answer.status_code in (403, 404), (method, place, answer.text)
        after = alice.portal("GET", where).json()
        assert (after["digest"], [one["name"] for one in after["tags"]]) == (digest, [tag["name"]])

    def test_a_notebook_forges_nothing(self, lab: Lab, alice: Person, bob: Person) -> None:
        mine, theirs = Session(lab, BOB), Session(lab, "alice")
        victim = theirs.known()["session"]["id"]
        # Another's session, save and image, with the own token.
        for body in ({"session": victim}, {"user": "alice"}, {"owner": "alice"}):
            assert mine.call("POST", "session/saves", json=body).status_code == 422
        for text in ("[" * 100_000, "7", '{"name": "' + "\u202e" + '"}', '{"tag": ["x"]}'):
            assert mine.call("POST", "session/saves", data=text.encode()).status_code == 422, text[:20]
        assert "Traceback" not in lab.log("hub")
        save = theirs.call("GET").json()["save"]["id"]
        for method, where in [("GET", ""), ("GET", "/events"), ("DELETE", "")]:
            assert mine.call(method, f"session/saves/{save}{where}").status_code == 404
        # Headers that a proxy or a portal would set.
        forged = {
            "Upperdeck-User": "alice", "X-Forwarded-User": "alice", "Remote-User": "alice",
            "Cookie": "service-upperdeck=x; jupyterhub-session-id=x", "Upperdeck-Page": "x",
        }  # fmt: skip
        service = f"http://127.0.0.1:{lab.service_port}/services/upperdeck/"
        for base in (f"{lab.hub}/services/upperdeck/", service, f"{lab.manager_url}/"):
            answer = requests.get(f"{base}api/v1/images", headers=forged, timeout=60)
            assert answer.status_code == 401, (base, answer.text)
        # The own token and tokens of its own making, at the manager, whose address a notebook on the host reaches.
        import jwt
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        now = int(time.time())
        claims = {"iss": "jupyterhub-upperdeck", "aud": "upperdeck", "sub": "alice", "iat": now, "exp": now + 60}
        public = (lab.directory / "hub-keys/jwks.json").read_text()
        tokens = [
            mine.token,
            jwt.encode(claims, Ed25519PrivateKey.generate(), algorithm="EdDSA"),
            jwt.encode(claims, "", algorithm="none"),
            signed_with_a_text(claims, public),
        ]
        for token in tokens:
            for kind in ("Bearer", "token"):
                answer = requests.get(
                    f"{lab.manager_url}/api/v1/me", headers={"Authorization": f"{kind} {token}"}, timeout=60
                )
                assert answer.status_code == 401, answer.text
        # The key is not where a server could read it, and neither are tokens of the service.
        assert mine.shell(f"cat {lab.directory}/hub-keys/signing-key.pem 2>&1 || true").endswith(
            "No such file or directory"
        )
        environment = mine.shell("env")
        assert "SIGNING" not in environment and theirs.token not in environment
        # A token that the user makes: for another's server it has no right, and for the own one no more than that.
        wanted = {"scopes": ["access:servers!server=alice/", "access:services!service=upperdeck"]}
        assert bob.api("POST", f"users/{BOB}/tokens", json=wanted).status_code in (400, 403)
        # The browser's cookie alone, without what only the page knows.
        assert alice.portal("GET", "api/v1/images", headers={"X-XSRFToken": ""}).status_code == 401
        assert (
            alice.portal("POST", "api/v1/saves", headers={"X-XSRFToken": "x"}, json={"session": victim}).status_code
            == 401
        )
        # The owner in the environment is the hub's, whatever the server's user asks for.
        assert mine.environment["UPPERDECK_OWNER"] == owner_of(BOB)

    def test_a_stop_without_the_registry_ends_within_its_bound(self, lab: Lab, bob: Person) -> None:
        (lab.directory / "bound").write_text("6")
        lab.registry.stop()
        bob.stop()
        lab.start_registry()
        assert len(lab.engine("ps", "--all", "--quiet").split()) == 1, "the other user's server runs on"
        page = bob.spawn_page()
        assert "Not saved: it took longer than 6 s" in page
        bob.enter_portal()
        assert bob.portal("GET", "api/v1/images").json()["images"] == []

    def test_the_culler_saves(self, lab: Lab, browser: Browser, alice: Person) -> None:
        """The idle culler itself, which here takes every server for idle."""
        environment = {
            **os.environ,
            "JUPYTERHUB_API_TOKEN": lab.culler_token,
            "JUPYTERHUB_API_URL": f"{lab.hub}/hub/api",
        }
        culler = Daemon(
            [sys.executable, "-m", "jupyterhub_idle_culler", "--timeout=1", "--cull-every=2"],
            lab.directory / "culler.log",
            env=environment,
        )
        try:
            until("the stop", alice.stopped)
        finally:
            culler.stop()
        alice.enter_portal()
        images = alice.portal("GET", "api/v1/images").json()["images"]
        assert "Saved when the server stopped" in [one.get("message") for one in images]
        page = alice.spawn_page()
        # As a version of what it was started from.
        assert "Last stop" in page and "Saved as analysis:" in page
        browser.go(f"{lab.hub}/hub/spawn")
        browser.see("Last stop")
        browser.shot("12-spawn-page-after-the-cull")
