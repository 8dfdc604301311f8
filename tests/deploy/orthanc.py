"""Orthanc on loopback, with its DICOMweb plugin: found, or installed by `make test-pacs`."""

import email
import json
import os
import shutil
import subprocess
import sys
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
PATH = os.environ.get("PATH", "") + ":/usr/sbin"
PACKAGES = ("orthanc", "orthanc-dicomweb", "dicom3tools")


def missing():
    """Why the tests cannot run here; empty where they can."""
    if shutil.which("Orthanc", path=PATH) and PLUGIN.exists() and shutil.which("dciodvfy"):
        return ""
    return f"no Orthanc with DICOMweb, or no dciodvfy; Debian: apt-get install {' '.join(PACKAGES)}"


def install():
    """Install what is missing.

    Raises:
        SystemExit: it can't be; says why.
    """
    if not missing():
        return
    if os.geteuid() or not shutil.which("apt-get"):
        raise SystemExit(missing())
    quiet = dict(env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"}, capture_output=True, text=True)
    for command in ("update", f"install -y --no-install-recommends {' '.join(PACKAGES)}"):
        print("Installing Orthanc: apt-get", command, flush=True)
        done = subprocess.run(["apt-get", "-qq", *command.split()], **quiet)
        if done.returncode:
            raise SystemExit(f"{done.stdout}{done.stderr}"[-2000:] + f"\n{missing()}")


class Orthanc:
    """A running one: its ports, and the few requests that the tests make."""

    def __init__(self, http, dicom):
        self.http, self.dicom = http, dicom

    def ask(self, path, body=None, kind="application/json", accept="application/json"):
        url, headers = f"http://127.0.0.1:{self.http}{path}", {"Content-Type": kind, "Accept": accept}
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=120) as answer:
            return answer.headers, answer.read()

    def stow(self, paths):
        """Store files (STOW-RS)."""
        mark = uuid4().hex
        parts = [f"--{mark}\r\nContent-Type: application/dicom\r\n\r\n".encode() + p.read_bytes() for p in paths]
        body = b"\r\n".join([*parts, f"--{mark}--\r\n".encode()])
        self.ask("/dicom-web/studies", body, f'multipart/related; type="application/dicom"; boundary={mark}')

    def find(self, what, **tags):
        """What matches (QIDO-RS)."""
        wanted = "&".join(f"{name}={value}" for name, value in tags.items())
        return json.loads(self.ask(f"/dicom-web/{what}?{wanted}")[1] or "[]")

    def get(self, study, folder):
        """Write the files of a study to a folder (WADO-RS)."""
        headers, body = self.ask(f"/dicom-web/studies/{study}", accept='multipart/related; type="application/dicom"')
        whole = email.message_from_bytes(f"Content-Type: {headers['Content-Type']}\r\n\r\n".encode() + body)
        folder.mkdir()
        for i, part in enumerate(whole.get_payload()):
            (folder / f"{i}.dcm").write_bytes(part.get_payload(decode=True))
        return folder


@contextmanager
def running(folder, peers):
    """Orthanc until the block ends; `peers` are those that it may send to, {name: (title, host, port)}."""
    from dicom_peers import wait_until
    from ports import free_port

    server, program = Orthanc(free_port(), free_port()), shutil.which("Orthanc", path=PATH)
    settings = {
        "StorageDirectory": str(folder), "IndexDirectory": str(folder), "Plugins": [str(PLUGIN)],
        "HttpPort": server.http, "DicomPort": server.dicom, "DicomAet": "ORTHANC", "DicomModalities": peers,
    }  # fmt: skip
    (folder / "orthanc.json").write_text(json.dumps(settings))
    with open(folder / "log", "w") as log, subprocess.Popen([program, folder / "orthanc.json"], stderr=log) as process:

        def is_up():
            assert process.poll() is None, (folder / "log").read_text()[-2000:]
            with suppress(OSError):
                return server.ask("/system")

        try:
            wait_until(is_up)
            yield server
        finally:
            process.terminate()


if __name__ == "__main__":
    install()
    sys.exit(missing() or 0)
