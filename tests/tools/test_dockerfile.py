"""The gateway's Dockerfile: linted, and held against the repository. It is built nowhere here."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from medctkit.cli import app

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "tools" / "gateway.Dockerfile"
TEXT = FILE.read_text()


@pytest.mark.skipif(sys.platform == "win32", reason="hadolint comes as a package for Linux and macOS only")
@pytest.mark.parametrize(("text", "fine"), [(TEXT, True), ("FROM python\nRUN sudo pip install x\n", False)])
def test_hadolint_has_nothing_to_say(text, fine):
    command = [Path(sys.executable).with_name("hadolint"), "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    assert (done.returncode == 0) == fine, done.stdout


def test_what_it_copies_is_there_and_nothing_else_is_let_through():
    _, everything, *kept = FILE.with_name(f"{FILE.name}.dockerignore").read_text().split("\n")
    copied = [path for line in re.findall(r"^COPY (.+) \S+$", TEXT, re.M) for path in line.split()]
    assert everything == "*" and kept == [*(f"!{path}" for path in copied), "**/__pycache__", ""]
    assert all((ROOT / path).exists() for path in copied)


def test_it_starts_the_gateway_as_the_command_is():
    program, command, *arguments = json.loads(re.search(r"^ENTRYPOINT (.+)$", TEXT, re.M)[1])
    known = {option: p for p in typer.main.get_command(app).commands[command].params for option in p.opts}
    assert program == "medctkit" and arguments[-1] == "/queue" and f"EXPOSE {known['--port'].default}\n" in TEXT
    assert {a for a in arguments if a.startswith("--")} <= set(known)
