"""Which Chromium the browser tests drive: one that is there, else one installed here.

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


def playwrights_own() -> str | None:
    """Where `playwright install chromium` puts its Chromium, if it has."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    return path if Path(path).exists() else None


def find() -> str | None:
    """The program that MEDCTKIT_CHROMIUM names, the system's Chromium or Chrome, or playwright's own; else None.

    Raises:
        SystemExit: MEDCTKIT_CHROMIUM names something that does not start.
    """
    named = os.environ.get(VARIABLE)
    if named:
        if not works(named):
            raise SystemExit(f"{VARIABLE} is {named!r}, which does not start; name a Chromium's program, or unset it.")
        return named
    for name in NAMES:
        path = shutil.which(name)
        if path and works(path):
            return path
    return playwrights_own()


def ways_to_install(is_root: bool, has_apt: bool) -> list[list[list[str]]]:
    """The ways to try in turn, each a list of commands."""
    apt = ["apt-get", "-qq", "-o", "Dpkg::Use-Pty=0"]
    own = [sys.executable, "-m", "playwright", "install", *(["--with-deps"] if is_root and has_apt else []), "chromium"]
    debian = [[*apt, "update"], [*apt, "install", "-y", "--no-install-recommends", "chromium"]]
    return [debian, [own]] if is_root and has_apt else [[own]]


def install() -> str:
    """Install a Chromium; quiet unless nothing worked.

    Raises:
        SystemExit: no way worked; says what was tried and what to do.
    """
    tried = []
    for commands in ways_to_install(os.geteuid() == 0, shutil.which("apt-get") is not None):
        for command in commands:
            print("Installing Chromium:", *command, flush=True)
            quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
            out = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            done = subprocess.run(command, env=quiet, **out)
            if done.returncode:
                tried.append(f"{' '.join(command)}\n{done.stdout[-2000:]}")
                break
        path = find()
        if path:
            return path
    raise SystemExit(
        "\n".join(tried)
        + "\nThe browser tests need Chromium or Chrome, and it could not be installed: the lines above "
        f"say why.\nInstall one (Debian: sudo apt-get install chromium), or name its program in {VARIABLE}."
    )


if __name__ == "__main__":
    print("Browser:", find() or install())
