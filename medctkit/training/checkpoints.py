"""Where a run of fine-tuning stands, in one file that is written whole or not at all.

What the file holds is all that the next step depends on: the trained parameters, the best ones so far, the
optimiser's averages, the loss scale of fp16, the history. Batches, prompt wordings and dropout are drawn from the seed
and the number of the step, so there is no other state. At full size with preset "paper" that is 27 MB.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from medctkit.common.atomic import replacing
from medctkit.lora.methods import save_trained
from medctkit.model.protocol import Model
from medctkit.training.settings import FineTuneConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

NAME = "checkpoint.safetensors"
_COUNTS = ("step", "history", "best_step", "best_score", "seconds")  # written as JSON
_AVERAGES = ("step", "exp_avg", "exp_avg_sq")  # of AdamW


class Run:
    """Where a run stands: what `restore` brings back and `save` writes down. Files are the main process's business.

    `output_dir` gets the checkpoint, and `adapter`: the best parameters so far. `history` has a row for each of the
    `step` optimiser steps done, and one for step 0; `best` holds the trained parameters of the best validation score.
    """

    def __init__(
        self,
        model: Model,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
        output_dir: Path,
        made_of: Mapping[str, Any],
    ):
        self.model, self.optimizer, self.accelerator, self.made_of = model, optimizer, accelerator, made_of
        self.file, self.adapter_dir = output_dir / NAME, output_dir / "adapter"
        self.trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.step, self.best_step, self.best_score = 0, -1, -math.inf
        self.history: list[dict[str, float]] = []
        self.best: dict[str, torch.Tensor] = {}
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Spent so far, before interruptions too."""
        return time.perf_counter() - self._started

    @property
    def validations_without_best(self) -> int:
        """Validations since the best one."""
        return sum("score" in row and row["step"] > self.best_step for row in self.history)

    def restore(self) -> None:
        """Go on where an interrupted run stood, if there was one: bit for bit what `save` saw.

        Raises:
            ValueError: a damaged checkpoint, or one of another run; in all processes.
        """
        from accelerate.utils import broadcast_object_list

        found: Any = None
        if self.accelerator.is_main_process:
            # what a run that was killed while it wrote has left under temporary names
            for half in (*self.file.parent.glob(f".{NAME}.*.tmp"), *self.adapter_dir.glob(".*.tmp")):
                half.unlink()
            for folder in self.adapter_dir.glob(".saving-*"):
                shutil.rmtree(folder)
            try:
                found = read(self.file, self.made_of) if self.file.is_file() else None
            except ValueError as error:
                found = error
        (found,) = broadcast_object_list([found])
        if isinstance(found, ValueError):
            raise found
        if found is None:
            return
        counts, tensors = found
        self._started -= counts["seconds"]
        for name in set(_COUNTS) - {"seconds"}:
            setattr(self, name, counts[name])
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(tensors[f"now.{name}"])
                self.best[name] = tensors[f"best.{name}"].to(parameter.device)
                if f"optimizer.step.{name}" in tensors:
                    kept = {key: tensors[f"optimizer.{key}.{name}"] for key in _AVERAGES}
                    moved = {key: t if key == "step" else t.to(parameter.device) for key, t in kept.items()}
                    self.optimizer.state[parameter] = moved  # its step stays on the CPU, as AdamW makes it
        if self.accelerator.scaler is not None and counts["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(counts["scaler"])

    def keep_if_best(self, step: int, score: float) -> None:
        """Keep the trained parameters, here and on disk, if no score was better."""
        if score > self.best_score:
            self.best_step, self.best_score = step, score
            self.best = {name: p.detach().clone() for name, p in self.trainable.items()}
            if self.accelerator.is_main_process:
                save_trained(self.model, self.adapter_dir)

    def save(self) -> None:
        """Write the checkpoint."""
        from safetensors.torch import save_file

        if not self.accelerator.is_main_process:
            return
        tensors = {f"now.{name}": p for name, p in self.trainable.items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for name, parameter in self.trainable.items():
            tensors |= {f"optimizer.{key}.{name}": t for key, t in self.optimizer.state.get(parameter, {}).items()}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        scaler = self.accelerator.scaler
        counts = {name: getattr(self, name) for name in _COUNTS}
        counts |= {"made_of": dict(self.made_of), "scaler": None if scaler is None else scaler.state_dict()}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.file) as temporary:
            save_file(tensors, temporary, metadata={"medctkit": json.dumps(counts)})

    def finish(self) -> None:
        """The best parameters onto the model and into `adapter`; a finished run needs no checkpoint."""
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(self.best[name])
        self.model.eval()
        if self.accelerator.is_main_process:
            save_trained(self.model, self.adapter_dir)  # what an interrupted run left there may be of a later step
            self.file.unlink(missing_ok=True)


def read(path: Path, made_of: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read a checkpoint of the same run, what is written down about it, and its tensors; refuse any other."""
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


def made_of(model: Model, dataset: Any, config: FineTuneConfig) -> dict[str, Any]:
    """What a run is made of, so that a checkpoint is taken up by the same run only.

    Settings one by one, without those that change nothing; digests of the prompts, of the frozen weights (a few of each
    tensor), of the shapes of what is trained, and of the studies in their order.
    """
    trainable = [(name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad]
    frozen = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if name not in dict(trainable):
            frozen.update(f"{name} {tuple(tensor.shape)}".encode())
            frozen.update(tensor.detach().flatten()[:64].float().cpu().numpy().tobytes())
    studies = repr([(row["study"], row.get("checksum")) for row in getattr(dataset, "rows", ())])
    digests = {
        "prompts": hashlib.sha256(repr(config.prompts).encode()).hexdigest(),
        "base model": frozen.hexdigest(),
        "trained parameters": hashlib.sha256(repr(trainable).encode()).hexdigest(),
        "training studies": f"{len(dataset)}, {hashlib.sha256(studies.encode()).hexdigest()}",
    }
    return config.values("prompts", "workers", "checkpoint_every") | {key: text[:22] for key, text in digests.items()}
