"""A headless Chromium for tests of pages. It opens files; nothing else is let through to it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@contextmanager
def chromium(profile: Path, width: int, dark: bool = False) -> Iterator[Any]:
    """A selenium driver with an empty profile folder, a window of `width` CSS pixels, and a colour scheme.

    Skips the test where there is no browser; fails when QUANTKIT_REQUIRE_JUDGES is set.
    """
    webdriver, browser, driver_path = _found()
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for option in (*_OPTIONS, f"--user-data-dir={profile}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_path))
    try:
        size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        driver.get("about:blank")
        requests(driver), complaints(driver)  # what its own first page did
        yield driver
    finally:
        driver.quit()


def requests(driver: Any) -> list[str]:
    """The addresses that pages have asked for since the last call; not the browser's own pages."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [url for url in urls if not url.startswith("chrome")]


def complaints(driver: Any) -> list[str]:
    """What the console has said."""
    return [str(entry["message"]) for entry in driver.get_log("browser")]


def _found() -> tuple[Any, str, str]:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    try:
        from selenium import webdriver
    except ModuleNotFoundError:
        webdriver = None
    missing = [name for name, there in (("chromium", browser), ("chromedriver", driver)) if there is None]
    missing += [] if webdriver is not None else ["the package selenium"]
    if missing:
        reason = f"no browser to open pages in: {', '.join(missing)} missing"
        if os.environ.get("QUANTKIT_REQUIRE_JUDGES"):
            pytest.fail(reason)
        pytest.skip(reason)
    return webdriver, str(browser), str(driver)
