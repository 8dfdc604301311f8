"""JupyterLab and voila on 127.0.0.1, for the tests: own settings, own folder, own log."""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from ports import free_port

TOKEN = "medctkit-browser-tests"
QUIET_LAB = {
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/docmanager-extension:plugin": {"autosave": False},
}


def environment(settings: Path) -> dict[str, str]:
    """Environment variables that keep a server from the user's own settings and kernels."""
    folders = {f"JUPYTER_{name}_DIR": settings / name.lower() for name in ("CONFIG", "DATA", "RUNTIME")}
    folders |= {"IPYTHONDIR": settings / "ipython", "JUPYTERLAB_SETTINGS_DIR": settings / "user-settings"}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    labconfig = settings / "config" / "labconfig"
    labconfig.mkdir(exist_ok=True)
    (labconfig / "default_setting_overrides.json").write_text(json.dumps(QUIET_LAB))
    startup = settings / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True, exist_ok=True)
    shutil.copy(Path(__file__).with_name("kernel_startup.py"), startup)
    return {
        **os.environ,
        **{name: str(folder) for name, folder in folders.items()},
        "KERNEL_LOG": str(settings / "kernels.log"),
        "MPLCONFIGDIR": str(settings / "matplotlib"),
        "PYTHONUNBUFFERED": "1",
    }


class Server:
    """A running server; `url` has its root, `logs` what it wrote and what went wrong in its kernels.

    Args:
        kind: "lab" or "voila".
        root: folder with the notebooks.
        settings: folder for its settings and its log.
    """

    def __init__(self, kind: str, root: Path, settings: Path):
        self.kind, self.root = kind, root
        self.logs = (settings / f"{kind}.log", settings / "kernels.log")
        self._read: dict[Path, int] = {}
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m"]
        if kind == "lab":
            command += ["jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={self.port}", "--allow-root"]
            command += ["--ServerApp.port_retries=0", f"--IdentityProvider.token={TOKEN}", "--expose-app-in-browser"]
            command += [f"--ServerApp.root_dir={root}"]
        else:
            command += ["voila", str(root), "--no-browser", "--Voila.ip=127.0.0.1", f"--port={self.port}"]
            command += [f"--token={TOKEN}", "--show_tracebacks=True"]
        (settings / "kernels.log").touch()
        with open(self.logs[0], "w") as log:
            self.process = subprocess.Popen(
                command, cwd=root, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment(settings)
            )
        self._wait()

    def _wait(self, seconds: float = 240) -> None:
        """Until it answers."""
        page = {"lab": "/api", "voila": f"/?token={TOKEN}"}[self.kind]
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                urllib.request.urlopen(self.url + page, timeout=5).close()
                return
            except OSError:
                time.sleep(0.2)
        self.close()
        raise RuntimeError(f"{self.kind} did not start:\n{self.logs[0].read_text()[-3000:]}")

    def address_of(self, notebook: str) -> str:
        """Where the browser finds a notebook, given its path from the root folder."""
        page = {"lab": "lab/tree", "voila": "voila/render"}[self.kind]
        return f"{self.url}/{page}/{notebook}?token={TOKEN}" + ("&reset" if self.kind == "lab" else "")

    def new_lines(self) -> dict[str, str]:
        """What has come to each log since the last call."""
        new = {}
        for log in self.logs:
            with open(log, errors="replace") as file:
                file.seek(self._read.get(log, 0))
                new[log.name], self._read[log] = file.read(), file.tell()
        return new

    def close(self) -> None:
        """Stop the server; it stops its kernels."""
        self.process.terminate()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
