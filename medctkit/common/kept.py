"""Arrays that an interrupted command has made, kept until it ends."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from medctkit.common.atomic import replacing


def kept(path: Path, key: str, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Arrays and numbers that stand in the .npz file `path` under the same `key`, or that `make` makes for it now."""
    if path.is_file():
        with np.load(path, allow_pickle=False) as file:
            found = dict(file)
        if str(found.pop("key", "")) == key:
            return {name: value.item() if value.ndim == 0 else value for name, value in found.items()}
    path.parent.mkdir(exist_ok=True)
    made = dict(make())
    with replacing(path) as temporary, temporary.open("wb") as stream:
        np.savez(stream, key=key, **made)  # type: ignore[arg-type]
    return made
