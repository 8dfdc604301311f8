"""What stands beside a result."""

import subprocess

from medctkit.common import provenance


def test_asking_for_the_commit_takes_no_lock_of_git(monkeypatch):
    asked, run = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **rest: asked.append(command) or run(command, **rest))
    provenance.commit()
    assert asked and all("--no-optional-locks" in command for command in asked)
