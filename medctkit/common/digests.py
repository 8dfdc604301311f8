"""Digests: whether facts, or a file, are still what they were."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def digest_of_facts(facts: Any) -> str:
    """A digest of what JSON can hold."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def sha256_of(path: str | os.PathLike) -> str:
    """The SHA-256 of a file, as `sha256sum` prints it."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
