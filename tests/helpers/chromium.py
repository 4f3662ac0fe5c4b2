"""Headless Chromium for tests of pages, with a fresh profile and no network of its own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest


def require_chromium() -> None:
    """Skip the test where Chromium or its driver is not installed."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("chromium or chromedriver is not installed (Debian: chromium, chromium-driver)")


def chromium(profile: Path, *arguments: str) -> Any:
    """A selenium driver; `arguments`: further ones of Chromium, without their dashes."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for name in (
        *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync"),
        *("disable-background-networking", "disable-component-update", f"user-data-dir={profile}"),
        *arguments,
    ):
        options.add_argument(f"--{name}")
    driver = webdriver.Chrome(options=options, service=Service(str(shutil.which("chromedriver"))))
    driver.set_script_timeout(120)
    return driver


def press(driver: Any, keys: str) -> None:
    """Press keys, as on a keyboard, where the focus is."""
    from selenium.webdriver.common.actions.action_builder import ActionBuilder

    actions = ActionBuilder(driver, duration=0)
    actions.key_action.send_keys(keys)
    actions.perform()
