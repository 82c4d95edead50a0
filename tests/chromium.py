"""Headless Chromium for tests of pages."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

PACKAGES = ("chromium", "chromium-driver")


def install() -> None:
    """Install Chromium and its driver if possible (as root on Debian), else skip the test."""
    if shutil.which("chromium") and shutil.which("chromedriver"):
        return
    if os.geteuid() != 0 or not Path("/etc/debian_version").exists():
        pytest.skip("needs chromium and chromedriver (as root on Debian, the test installs them)")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (["update", "-q"], ["install", "-qy", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(["apt-get", *arguments], env=environment, capture_output=True, text=True, timeout=600)
        if done.returncode:
            pytest.skip(f"apt-get could not install {' '.join(PACKAGES)}: {done.stderr.strip()[-200:]}")


def browser(downloads: Path):
    """Return a driver whose browser can reach only this machine and saves files to `downloads`."""
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = shutil.which("chromium")
    for option in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1280,860"):
        options.add_argument(f"--{option}")
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
