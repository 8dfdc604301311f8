"""Weights out of files: read without running code, checked against what was written, and refused unless they fit.

There is one strictness for all of them, base model, adapter or checkpoint of a run: every name and shape, numbers with
a point, all finite.
"""

import math
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from medctkit.common.atomic import write_text
from medctkit.common.digests import sha256_of
from medctkit.common.text import listed, stand_in

SUMS = "SHA256SUMS"  # as `sha256sum` writes and checks it


def read_weights(path: str | os.PathLike) -> Any:
    """What a file of weights holds, whatever it is called: safetensors, or what `torch.save` wrote, old or new.

    No code in it is run. Archives are checked against their own checksums, and any file against `SHA256SUMS` beside it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no file of weights, a damaged one, or one with pickled code.
        MemoryError: no room for it.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; `medctkit download --weights` fetches the released one")
    with path.open("rb") as file:
        start = file.read(64)
    if what := stand_in(start):
        raise ValueError(f"{path} is {what}")
    _refuse_other_sum(path)
    try:
        if start[8:9] == b"{":  # after the length of its header
            return safetensors.torch.load_file(path)
        archive = zipfile.is_zipfile(path)
        if archive and (part := zipfile.ZipFile(path).testzip()):  # torch compares no checksum
            raise ValueError(f"{part} in it is not what was written")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch raises pickle, zip, EOF and runtime errors alike
        if "allocate memory" in str(error):
            raise MemoryError(f"{path}: {error}") from error
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        if isinstance(error, pickle.UnpicklingError):  # whose text advises to run the code
            reason = "it holds pickled Python code, or is no checkpoint at all"
        raise ValueError(
            f"{path} cannot be read as a checkpoint: {reason}. Only tensors are read, never code. If it should be "
            "one, it is damaged: download it again"
        ) from error


def write_weights(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; a full disk is an OSError, as with any other file."""
    try:
        safetensors.torch.save_file(dict(tensors), path, dict(metadata))
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def write_sum(path: Path) -> None:
    """Write the SHA-256 of a file of weights beside it, for `read_weights` to find."""
    write_text(path.with_name(SUMS), f"{sha256_of(path)}  {path.name}\n")


def _refuse_other_sum(path: Path) -> None:
    sums = path.with_name(SUMS)
    lines = sums.read_text(encoding="utf-8", errors="replace").splitlines() if sums.is_file() else []
    known = {name.lstrip(" *"): digest for digest, _, name in (line.partition(" ") for line in lines)}
    if path.name in known and (found := sha256_of(path)) != known[path.name].lower():
        raise ValueError(
            f"{path} is not the file that was saved there: its SHA-256 is {found}, by {sums} it should be "
            f"{known[path.name]}. Download it again; if you changed it yourself, delete {SUMS}"
        )


def refuse_other_shapes(found: Mapping[str, torch.Tensor], expected: Mapping[str, tuple], message: str) -> None:
    """Refuse tensors unless names and shapes are those expected.

    Raises:
        ValueError: `message`, and the first few that are missing, left over or of another shape.
    """
    there = {name: tuple(tensor.shape) for name, tensor in found.items()}
    wrong = [name for name in {**there, **expected} if there.get(name) != expected.get(name)]
    if wrong:
        lines = (f"  {n}: saved {there.get(n, 'none')}, model {expected.get(n, 'none')}" for n in wrong)
        raise ValueError(f"{message}. Tensors that differ:\n{listed(lines)}")


def refuse_bad_numbers(tensors: Mapping[str, torch.Tensor], source: Any) -> None:
    """Refuse tensors that hold anything but finite numbers with a point, as float32 has them.

    Raises:
        ValueError: names the first such tensor, and `source`.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_meta:
            kind = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}".replace("torch.", "")
            raise ValueError(
                f"{source}: {name} is {kind}; weights are plain tensors of floating point. Save the model anew as it "
                "was trained, not quantised or converted"
            )
        low, high = map(float, tensor.detach().float().aminmax()) if tensor.numel() else (0.0, 0.0)
        if not (math.isfinite(low) and math.isfinite(high)):  # NaN is neither
            raise ValueError(
                f"{source}: {name} has values that are not finite; the training that made it diverged, or the file is "
                "damaged. Take an earlier one, or download it again"
            )
