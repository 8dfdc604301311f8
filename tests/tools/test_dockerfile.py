"""The gateway's Dockerfile: linted, and held against the repository. It is built nowhere here."""

import json
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import typer

from medctkit.cli import app

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "tools" / "gateway.Dockerfile"


@pytest.mark.skipif(sys.platform == "win32", reason="hadolint comes as a package for Linux and macOS only")
@pytest.mark.parametrize(("text", "fine"), [(FILE.read_text(), True), ("FROM python\nRUN sudo pip install x\n", False)])
def test_hadolint_has_nothing_to_say(text, fine):
    command = [Path(sys.executable).with_name("hadolint"), "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    assert (done.returncode == 0) == fine, done.stdout


def test_what_it_copies_is_there_and_let_through_and_no_run_or_scan_is():
    lines = FILE.with_name(f"{FILE.name}.dockerignore").read_text().splitlines()
    kept = [line[1:] for line in lines if line.startswith("!")]
    assert [line for line in lines if line[:1] not in ("!", "#")][0] == "*"
    copied = [path for line in re.findall(r"^COPY (.+) \S+$", FILE.read_text(), re.M) for path in line.split()]
    assert sorted(copied) == sorted(kept) and all((ROOT / path).exists() for path in copied)
    assert not any(fnmatch(name, path) for name in ("runs", "data", "notebooks", ".git") for path in kept)


def test_it_starts_the_gateway_as_the_command_is():
    text = FILE.read_text()
    program, command, *arguments = json.loads(re.search(r"^ENTRYPOINT (.+)$", text, re.M)[1])
    known = typer.main.get_command(app).commands[command].params
    port = next(p for p in known if "--port" in p.opts)
    assert program == "medctkit" and arguments[-1] == "/queue" and f"EXPOSE {port.default}\n" in text
    assert {a for a in arguments if a.startswith("--")} <= {o for p in known for o in p.opts}
