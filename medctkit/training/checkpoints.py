"""Where a run of fine-tuning stands, in one file that is written whole or not at all.

What the file holds is all that the next step depends on: the trained parameters, the best ones so far, the
optimiser's averages, the loss scale of fp16, the history. Batches, prompt wordings and dropout are drawn from the seed
and the number of the step, so there is no other state. At full size with preset "paper" that is 27 MB.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from medctkit.common.atomic import replacing

if TYPE_CHECKING:
    from torch.utils.data import Dataset

NAME = "checkpoint.safetensors"


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        step: optimiser steps done.
        history: a row for each of them, and one for step 0.
        best_step: with the best validation score.
        best_score: that score.
        best: the trained parameters then, by name.
        seconds: spent so far.
    """

    step: int
    history: list[dict[str, float]]
    best_step: int
    best_score: float
    best: dict[str, torch.Tensor]
    seconds: float


def save(
    path: Path,
    progress: Progress,
    trainable: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: Any,
    made_of: Mapping[str, Any],
) -> None:
    """Write a checkpoint.

    Args:
        path: the file.
        progress: where the run stands.
        trainable: parameters by name, in the order in which the optimiser got them.
        optimizer: with its state.
        scaler: of fp16, or None.
        made_of: see `made_of`.
    """
    from safetensors.torch import save_file

    tensors = {f"now.{name}": p for name, p in trainable.items()} | {f"best.{n}": t for n, t in progress.best.items()}
    for name, parameter in trainable.items():
        tensors |= {f"optimizer.{key}.{name}": value for key, value in optimizer.state.get(parameter, {}).items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    rest = {key: getattr(progress, key) for key in ("step", "history", "best_step", "best_score", "seconds")}
    rest |= {"made_of": dict(made_of), "scaler": scaler.state_dict() if scaler is not None else None}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"medctkit": json.dumps(rest)})


def read(path: Path, made_of: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read a checkpoint of the same run: what is written down about it, and its tensors.

    Raises:
        ValueError: damaged, or of a run with another model, other data or settings; says which.
    """
    from safetensors import SafetensorError, safe_open

    way_out = f"Delete {path} to start over, or give another output_dir"
    try:
        with safe_open(str(path), "pt") as file:
            rest = json.loads(file.metadata()["medctkit"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged, or no checkpoint of medctkit: {error}. {way_out}") from None
    different = differences(rest["made_of"], made_of)
    if different:
        raise ValueError(
            f"{path} is of a run that was not finished, and not this one. {way_out}. {'; '.join(different)}"
        )
    return rest, tensors


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What a file says that it was made of (read from JSON) against what is at hand: a text for each difference."""
    here = json.loads(json.dumps(dict(here)))
    return [
        f"{key}: {there.get(key)!r} there, {here.get(key)!r} here"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
    ]


def restore(
    rest: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    trainable: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: Any,
) -> Progress:
    """Put what `read` gave back into parameters, optimiser and scaler; bit for bit what `save` saw."""
    best = {}
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(tensors[f"now.{name}"])
            best[name] = tensors[f"best.{name}"].to(parameter.device)
            kept = {key: tensors.get(f"optimizer.{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
            if kept["step"] is not None:  # its step stays on the CPU, as AdamW makes it
                optimizer.state[parameter] = {k: t if k == "step" else t.to(parameter.device) for k, t in kept.items()}
    if scaler is not None and rest["scaler"] is not None:
        scaler.load_state_dict(rest["scaler"])
    kept = {key: rest[key] for key in ("step", "history", "best_step", "best_score", "seconds")}
    return Progress(best=best, **kept)


def made_of(model: nn.Module, trainable: Mapping[str, nn.Parameter], dataset: Dataset, settings: Mapping) -> dict:
    """What a run is made of, so that a checkpoint is taken up by the same run only.

    Settings one by one, without those that change nothing; digests of the prompts, of the frozen weights (a few of each
    tensor), of the shapes of what is trained, and of the studies in their order.
    """
    frozen = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if name not in trainable:
            frozen.update(f"{name} {tuple(tensor.shape)}".encode())
            frozen.update(tensor.detach().flatten()[:64].float().cpu().numpy().tobytes())
    shapes = repr([(name, tuple(p.shape)) for name, p in trainable.items()])
    studies = repr([(row["study"], row.get("checksum")) for row in getattr(dataset, "rows", ())])
    settings = {key: value for key, value in settings.items() if key not in ("workers", "checkpoint_every")}
    digests = {
        "prompts": hashlib.sha256(repr(settings.pop("prompts")).encode()).hexdigest(),
        "base model": frozen.hexdigest(),
        "trained parameters": hashlib.sha256(shapes.encode()).hexdigest(),
        "training studies": f"{len(dataset)}, {hashlib.sha256(studies.encode()).hexdigest()}",
    }
    return settings | {key: digest[:22] for key, digest in digests.items()}
