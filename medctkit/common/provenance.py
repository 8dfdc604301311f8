"""What a result was made with, and writing it down."""

import json
import os
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medctkit.common.atomic import replacing

if TYPE_CHECKING:
    import pandas as pd


def made_with(seed: int, data: str = "phantom") -> dict:
    """Seed, device, versions, commit and data ("phantom", "CT-RATE", "real CT"): what a number needs beside it."""
    import torch  # here: who only writes JSON can do without

    threads = torch.get_num_threads()
    device = f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    versions = {name: version(name) for name in ("medctkit", "torch", "transformers", "peft", "numpy")}
    return {"seed": seed, "device": device, "versions": versions, "commit": commit(), "data": data}


def commit() -> str | None:
    """The commit of this package, with a + where files differ from it; None if it does not run from its repository."""
    package = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != package.parent:
            return None
        changed = git("status", "--porcelain", "--untracked-files=no", "--", str(package))
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def records(table: "pd.DataFrame") -> list[dict]:
    """The rows of a table as plain data, for JSON: None where there is no value."""
    return table.astype(object).where(table.notna(), None).to_dict("records")


def as_json(content: dict) -> bytes:
    """JSON as the kit writes it."""
    return json.dumps(content, indent=1).encode()


def write_json(content: dict, path: str | os.PathLike) -> None:
    """Write JSON, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(as_json(content))


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What a file says that it was made of (read from JSON) against what is at hand: a text for each difference."""
    here = json.loads(json.dumps(dict(here)))
    return [
        f"{key}: {there.get(key)!r} there, {here.get(key)!r} here"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
    ]
