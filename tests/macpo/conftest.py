"""Whole runs in one process, one thread each; and a browser for the pages that come of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)  # forks need a quiet parent, and two cores have other tests to run


@pytest.fixture(scope="session")
def chromium() -> Callable[..., Any]:
    """Starts headless Chromium with a fresh profile folder and no network of its own; returns its selenium driver.

    Further arguments are Chromium's, without their dashes. The test is skipped where Chromium is not installed.
    """
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("chromium or chromedriver is not installed (Debian: chromium, chromium-driver)")

    def start(profile: Path, *arguments: str) -> Any:
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

    return start
