"""Chromium, driven as a user would: what is clicked is seen, and screenshots are kept."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from lab import TREE, until

SHOTS = TREE / "target/jupyterhub/screenshots"


class Browser:
    """A browser with a profile of its own."""

    def __init__(self, directory: Path, language: str = "en-GB") -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium") or "/usr/bin/chromium"
        for word in (
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-extensions",
            "--no-first-run", "--disable-background-networking", "--window-size=1280,860", f"--lang={language}",
            f"--user-data-dir={directory}",
        ):  # fmt: skip
            options.add_argument(word)
        options.add_experimental_option("prefs", {"intl.accept_languages": language})
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        environment = {**os.environ, "LANGUAGE": language.replace("-", "_")}
        service = webdriver.ChromeService(shutil.which("chromedriver") or "/usr/bin/chromedriver", env=environment)
        self.driver = webdriver.Chrome(options=options, service=service)
        self.driver.set_page_load_timeout(120)

    def close(self) -> None:
        self.driver.quit()

    def go(self, url: str) -> None:
        self.driver.get(url)

    def shot(self, name: str) -> None:
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.driver.save_screenshot(str(SHOTS / f"{name}.png"))

    @property
    def text(self) -> str:
        return str(self.driver.execute_script("return document.body ? document.body.innerText : ''"))

    def _until(self, what: str, look: Callable[[], Any]) -> Any:
        def quietly() -> Any:
            try:
                return look()
            except WebDriverException:
                # The page was changing.
                return None

        try:
            return until(what, quietly)
        except AssertionError as error:
            self.shot("waiting")
            raise AssertionError(f"{error}; the page at {self.driver.current_url} says:\n{self.text}") from None

    def see(self, text: str) -> None:
        self._until(f"{text!r} on the page", lambda: text in self.text)

    def find(self, selector: str) -> WebElement:
        def look() -> WebElement | None:
            found = [one for one in self.driver.find_elements(By.CSS_SELECTOR, selector) if one.is_displayed()]
            return found[0] if found else None

        element: WebElement = self._until(selector, look)
        return element

    def click(self, selector: str) -> None:
        def press() -> bool:
            self.find(selector).click()
            return True

        self._until(f"a press of {selector}", press)

    def click_text(self, selector: str, text: str) -> None:
        def press() -> bool:
            for one in self.driver.find_elements(By.CSS_SELECTOR, selector):
                if one.is_displayed() and text in one.text:
                    one.click()
                    return True
            return False

        self._until(f"a press of {text!r}", press)

    def write(self, selector: str, text: str) -> None:
        field = self.find(selector)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(text)

    def type(self, selector: str, text: str) -> None:
        """Writes into a field that need not be seen, such as a terminal's."""

        def press() -> bool:
            self.driver.find_element(By.CSS_SELECTOR, selector).send_keys(text)
            return True

        self._until(f"a place to write in {selector}", press)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def speak(self, language: str) -> None:
        """Changes the browser's language and loads the page anew."""
        agent = self.run("return navigator.userAgent")
        self.driver.execute_cdp_cmd("Network.setUserAgentOverride", {"userAgent": agent, "acceptLanguage": language})
        self.driver.refresh()

    def dark(self, wanted: bool = True) -> None:
        """Prefers a dark page, as the system's setting does, and loads the page anew."""
        features = [{"name": "prefers-color-scheme", "value": "dark" if wanted else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.driver.refresh()

    def narrow(self, wanted: bool = True) -> None:
        """Makes the page as narrow as a telephone's."""
        if wanted:
            size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": False}
            self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        else:
            self.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

    def overflows(self) -> bool:
        """Returns whether the page is wider than its window."""
        return bool(self.run("const e = document.documentElement; return e.scrollWidth > e.clientWidth"))

    def errors(self) -> list[str]:
        """Returns what the console has of our own scripts: those that failed, and violations of the page's policy."""
        log: list[dict[str, Any]] = self.driver.get_log("browser")  # type: ignore[no-untyped-call]
        ours = ("labextensions/jupyterlab-upperdeck", "/services/upperdeck/")
        severe = [one["message"] for one in log if one["level"] == "SEVERE"]
        return [message for message in severe if any(place in message for place in ours)]
