"""Which Chromium the browser tests drive: one that is there, else one that is installed now.

`make test-browser` runs this file first; on a machine that has a browser it only prints where that is.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

VARIABLE = "MEDCTKIT_CHROMIUM"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
NAMES += tuple(f"/Applications/{name}.app/Contents/MacOS/{name}" for name in ("Google Chrome", "Chromium"))


def works(program: str | Path) -> bool:
    """Whether the program starts: Ubuntu's `chromium-browser`, for one, may only point to a snap that is not there."""
    try:
        return subprocess.run([program, "--version"], capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def find() -> str | None:
    """The program that MEDCTKIT_CHROMIUM names, the system's Chromium or Chrome, or playwright's own; else None."""
    from playwright.sync_api import sync_playwright

    if named := os.environ.get(VARIABLE):
        if not works(named):
            raise SystemExit(f"{VARIABLE} is {named!r}, which does not start; name a Chromium's program, or unset it.")
        return named
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
    return next((path for path in [*map(shutil.which, NAMES), own] if path and works(path)), None)


def install() -> str:
    """Install a Chromium: as root with apt the system's, else playwright's own."""
    ways = [[sys.executable, "-m", "playwright", "install", "chromium"]]
    if os.geteuid() == 0 and shutil.which("apt-get"):
        debian = "apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium"
        ways.insert(0, ["sh", "-c", debian])
    for command in ways:
        print("Installing Chromium:", *command, flush=True)
        subprocess.run(command, env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"})
        if path := find():
            return path
    raise SystemExit(
        "The browser tests need Chromium or Chrome, and it could not be installed: the lines above say why.\n"
        f"Install one (Debian: sudo apt-get install chromium), or name its program in {VARIABLE}."
    )


if __name__ == "__main__":
    print("Browser:", find() or install())
