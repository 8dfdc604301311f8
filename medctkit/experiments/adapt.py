"""The experiment: adapt a base model to a hospital; by default the mini model, to phantoms of the target hospital.

Notebook 03 walks through the same steps one by one; here they are in one call, for the command
line, for several seeds, and for the checks of the shipped base model.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from medctkit.cohort.dataset import load_split, prepared_dir
from medctkit.cohort.manifest import load_manifest
from medctkit.common.processes import accelerator_for
from medctkit.common.provenance import write_json
from medctkit.lora.adapter import add_lora
from medctkit.metrics.scores import evaluate
from medctkit.model.base_model import BaseModel, load_base, load_mini_base
from medctkit.training.loop import FineTuneResult, finetune
from medctkit.training.memory import cast_frozen
from medctkit.training.settings import FineTuneConfig
from medctkit.zero_shot.classifier import ZeroShotClassifier, validation_score

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Adaptation:
    """Settings of an adaptation; the defaults are the kit's experiment, chosen on its validation patients.

    Args:
        preset: LoRA placement, see `medctkit.lora.placement.PRESETS`.
        rank: of the adapter.
        steps: optimiser steps.
        batch_size: volumes per step, over all processes.
        learning_rate: its peak.
        micro_batch_size: volumes in memory at a time, in each process; None: all of its share.
        evaluate_every: optimiser steps between validations.
        patience: validations without a new best until it stops; None: never.
        mixed_precision: "no", "bf16", "fp16", or "auto": what the device is quick at.
        gradient_checkpointing: compute activations again instead of keeping them; for the full-size model.
        workers: processes that load volumes ahead.
        max_length: tokens a report is cut to.
    """

    preset: str = "paper"
    rank: int = 16
    steps: int = 200
    batch_size: int = 32
    learning_rate: float = 3e-3
    micro_batch_size: int | None = None
    evaluate_every: int = 25
    patience: int | None = None
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    workers: int = 0
    max_length: int = 128

    def config(self, seed: int) -> FineTuneConfig:
        """The settings as `finetune` takes them."""
        chosen = asdict(self)
        for of_the_model in ("preset", "rank", "gradient_checkpointing"):
            del chosen[of_the_model]
        if self.mixed_precision == "auto":
            chosen["mixed_precision"] = quick_precision()
        return FineTuneConfig(**chosen, seed=seed)


DEFAULT = Adaptation()
# The released model: rank and placement of the paper; the rest is where to start from, not a result.
FULL_SIZE = Adaptation(
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
    """What is adapted, and to which studies; written beside the adapter, so that it is measured on the same.

    Args:
        model: see `medctkit.model.base_model.load_base`.
        tokenizer: see `medctkit.model.base_model.load_base`.
        hospital: of the manifest; None: all of its studies.
    """

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


def quick_precision() -> str:
    """What the device is quick at: bf16 on a GPU that computes in it, fp16 on an older one (T4), on a CPU float32."""
    if not torch.cuda.is_available():
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def adapt(
    manifest_path, output_dir, seed: int = 0, settings: Adaptation = DEFAULT, cache_dir=None, origin: Origin = Origin()
) -> FineTuneResult:
    """Adapt a base model to the training studies of a hospital; by default the mini model, to the target hospital.

    Validation studies choose the best step; test studies are not read. Interrupted, the same call goes on.

    Args:
        manifest_path: usually `data_manifest.csv`.
        output_dir: see `medctkit.training.loop.finetune`; also gets `origin.json`.
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
        passes, validations = config.steps * config.batch_size / len(train), 1 + config.steps // config.evaluate_every
        print(
            f"training {trained:,} of {total:,} parameters: {config.steps} steps of {config.batch_size} volumes "
            f"({passes:.1f} passes over {len(train):,} studies), {validations} validations on {len(valid):,}",
            flush=True,
        )
    return finetune(model, train, base.tokenizer, config, output_dir, score)


def source_auroc(manifest_path, cache_dir, seed: int = 0) -> "pd.DataFrame":
    """The base model on its own hospital's test patients; see `medctkit.metrics.scores.evaluate`."""
    mini = load_mini_base()
    dataset = load_split(load_manifest(manifest_path), "source", "test", mini.preprocess_config, cache_dir)
    classifier = ZeroShotClassifier(mini.model, mini.tokenizer)
    seen = classifier.embed(dataset)
    return evaluate(seen.labels, classifier.scores_from_embeddings(seen.embeddings), seen.patients, seed=seed)
