"""The experiment: adapt a base model to a hospital; by default the mini model, to phantoms of the target hospital.

Notebook 03 walks through the same steps one by one.
"""

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from medctkit.cohort.dataset import load_split, prepared_dir
from medctkit.cohort.manifest import load_manifest
from medctkit.common.processes import accelerator_for
from medctkit.common.provenance import write_json
from medctkit.lora.adapter import add_lora
from medctkit.model.base_model import BaseModel, load_base
from medctkit.training.loop import FineTuneResult, finetune
from medctkit.training.memory import cast_frozen
from medctkit.training.settings import FineTuneConfig
from medctkit.zero_shot.classifier import validation_score


@dataclass(frozen=True)
class Adaptation(FineTuneConfig):
    """Settings of an adaptation: those of fine-tuning, and of what is trained.

    Args:
        preset: LoRA placement: "paper", "vision", "text" or "all-attention".
        rank: of the adapter.
        gradient_checkpointing: compute activations again instead of keeping them; for the full-size model.
    """

    preset: str = "paper"
    rank: int = 16
    gradient_checkpointing: bool = False

    def config(self, seed: int) -> FineTuneConfig:
        """The settings as `finetune` takes them, on this device."""
        return FineTuneConfig(**self.values() | {"seed": seed}).for_this_device()


# The kit's experiment, chosen on its validation patients.
DEFAULT = Adaptation(steps=200, batch_size=32, learning_rate=3e-3)
# The released model: rank and placement of the paper; the rest is where to start from, not a result.
FULL_SIZE = replace(
    DEFAULT,
    rank=24,
    steps=1000,
    learning_rate=2e-4,
    micro_batch_size=2,
    evaluate_every=100,
    patience=3,
    mixed_precision="auto",
    gradient_checkpointing=True,
    workers=2,
    max_length=512,
)


@dataclass(frozen=True)
class Origin:
    """What is adapted (see `load_base`), and to which studies (None: all); written beside the adapter to measure on."""

    model: str = "mini"
    tokenizer: str | None = None
    hospital: str | None = "target"

    def load(self) -> BaseModel:
        """The base model, fresh."""
        return load_base(self.model, self.tokenizer)

    @classmethod
    def of(cls, output_dir: Path) -> "Origin":
        """What `adapt` wrote down in `output_dir`; without it, the default experiment."""
        file = output_dir / "origin.json"
        return cls(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else cls()


def adapt(
    manifest_path: str | os.PathLike,
    output_dir: str | os.PathLike,
    seed: int = 0,
    settings: Adaptation = DEFAULT,
    cache_dir: str | os.PathLike | None = None,
    origin: Origin = Origin(),
) -> FineTuneResult:
    """Adapt a base model to the training studies of a hospital.

    Validation studies choose the best step; test studies are not read. Interrupted, the same call goes on.

    Args:
        manifest_path: usually `data_manifest.csv`.
        output_dir: see `finetune`; also gets `origin.json`.
        seed: of the adapter's start, batches and wordings.
        settings: of the adaptation.
        cache_dir: see `prepared_dir`.
        origin: base model and hospital.
    """
    output_dir = Path(output_dir)
    cache_dir = prepared_dir(manifest_path, output_dir, cache_dir)
    config, base, manifest = settings.config(seed), origin.load(), load_manifest(manifest_path)
    train, valid = (
        load_split(manifest, origin.hospital, split, base.preprocess_config, cache_dir) for split in ("train", "valid")
    )
    torch.manual_seed(seed)
    model = add_lora(base.model, settings.preset, r=settings.rank)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if config.mixed_precision != "no":
        cast_frozen(model, torch.bfloat16 if config.mixed_precision == "bf16" else torch.float16)
    at_a_time = config.micro_batch_size or config.batch_size
    score = validation_score(valid, base.tokenizer, batch_size=at_a_time, workers=config.workers)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(asdict(origin), output_dir / "origin.json")
    if accelerator_for().is_main_process:
        trained, total = model.get_nb_trainable_parameters()
        steps = config.steps_for(len(train))
        passes, validations = steps * config.batch_size / len(train), 1 + steps // config.evaluate_every
        print(
            f"training {trained:,} of {total:,} parameters: {steps} steps of {config.batch_size} volumes "
            f"({passes:.1f} passes over {len(train):,} studies), {validations} validations on {len(valid):,}",
            flush=True,
        )
    return finetune(model, train, base.tokenizer, config, output_dir, score)
