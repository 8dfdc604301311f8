"""The experiment: adapt a base model to a hospital; by default the mini model, to phantoms of the target hospital.

Notebook 03 walks through the same steps one by one.
"""

import json
import math
import os
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import Dataset

from medctkit.cohort.dataset import load_split, prepared_dir
from medctkit.cohort.manifest import load_manifest
from medctkit.common.processes import accelerator_for
from medctkit.common.provenance import write_json
from medctkit.lora.adapter import add_lora
from medctkit.lora.counting import count_trainable
from medctkit.lora.methods import METHODS, apply_method
from medctkit.model.base_model import BaseModel, load_base
from medctkit.model.protocol import Model
from medctkit.training.checkpoints import RECORD, finished_run, refuse_other_settings
from medctkit.training.loop import FineTuneResult, finetune
from medctkit.training.memory import cast_frozen
from medctkit.training.objectives import report_prompts
from medctkit.training.settings import FineTuneConfig
from medctkit.zero_shot.classifier import ZeroShotClassifier, validation_score
from medctkit.zero_shot.embeddings import with_embeddings


@dataclass(frozen=True)
class Adaptation(FineTuneConfig):
    """Settings of an adaptation: those of fine-tuning, and of what is trained.

    Args:
        preset: LoRA placement: "paper", "vision", "text", "all-attention", "mlp" or "all-linear".
        method: what is trained, one of `medctkit.lora.methods.METHODS`, such as "lora", "dora" or "full", but not
            "pissa"; each wants a learning rate of its own.
        rank: of the adapter, where the method has one.
        alpha: of LoRA, which scales the update by alpha / rank; None: twice the rank.
        dropout: of what enters a LoRA, 0 to below 1.
        gradient_checkpointing: compute activations again instead of keeping them; for the full-size model.
    """

    preset: str = "paper"
    method: str = "lora"
    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}; choose one of {', '.join(METHODS)}")
        if self.method == "pissa":
            raise ValueError(
                "method 'pissa' changes the base model too, so that no command could load what it trained; choose "
                "another, or have it measured by medctkit compare"
            )
        if self.preset != "paper" and self.method != "lora":
            raise ValueError(f"preset {self.preset!r} is a placement of method 'lora'; {self.method!r} has its own")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be from 0 to below 1, got {self.dropout}")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha must be above 0, or None for twice the rank, got {self.alpha}")
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")

    def apply(self, model: Model) -> Model:
        """A plain model with what is trained, in place.

        Raises:
            ValueError: see `add_lora` and `apply_method`; a setting that the method does not have.
        """
        lora = {"lora_alpha": self.alpha, "lora_dropout": self.dropout or None}
        given = {name: value for name, value in lora.items() if value is not None}
        if self.method == "lora":
            return add_lora(model, self.preset, r=self.rank, **given)
        rank = {} if METHODS[self.method].rank is None else {"r": self.rank}
        return apply_method(model, self.method, **rank | given)

    def config(self, seed: int) -> FineTuneConfig:
        """The settings as `finetune` takes them, on this device."""
        rate_of_b = self.rate_of_b * METHODS[self.method].rate_of_b
        return FineTuneConfig(**self.values() | {"seed": seed, "rate_of_b": rate_of_b}).for_this_device()


# The kit's experiment, chosen on its validation patients: the rate, the prompts in the words of home, and no reports.
DEFAULT = Adaptation(
    steps=80,
    batch_size=16,
    learning_rate=3e-3,
    contrastive_weight=0.0,
    evaluate_every=20,
    prompts=report_prompts("source"),
)
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


ORIGIN = "origin.json"


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
    def of(cls, output_dir: str | os.PathLike) -> "Origin":
        """What `adapt` wrote down in `output_dir`, whose run is finished and whose files are its own.

        Raises:
            FileNotFoundError: no finished run there, or nothing written down.
            ValueError: see `finished_run`; something else is written down.
        """
        finished_run(output_dir)
        file = Path(output_dir).expanduser() / ORIGIN
        if not file.is_file():
            raise FileNotFoundError(f"{file} is not there, which says what was adapted; `medctkit finetune` writes it")
        try:
            found = cls(**json.loads(file.read_text(encoding="utf-8")))
            if found.model is None or not all(isinstance(text, str | None) for text in vars(found).values()):
                raise TypeError(f"expected names, got {found}")
            return found
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file} does not say what was adapted: {error}. Do the run again") from None


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

    Raises:
        ValueError: see `finetune`; a folder where something else was adapted.
    """
    output_dir = Path(output_dir).expanduser()
    ended = (output_dir / ORIGIN).is_file() and (output_dir / RECORD).is_file()
    if ended and (there := Origin.of(output_dir)) != origin:
        raise ValueError(f"{output_dir} is of {there}, not of {origin}. Give another output_dir, or delete it")
    config = settings.config(seed)
    refuse_other_settings(output_dir, config)
    accelerator_for(config.mixed_precision, tracker=config.tracker)  # refuses a tracker that is not here
    cache_dir = prepared_dir(manifest_path, output_dir, cache_dir)
    base, manifest = origin.load(), load_manifest(manifest_path)
    load = partial(load_split, manifest, origin.hospital, preprocess_config=base.preprocess_config, cache_dir=cache_dir)
    train, valid, at_a_time = load("train"), load("valid"), config.micro_batch_size or config.batch_size
    studies: Dataset = train
    if config.anchor_weight:
        before = ZeroShotClassifier(base.model.to(accelerator_for().device), base.tokenizer)
        studies = with_embeddings(train, [before.embed(train, at_a_time)])
    torch.manual_seed(seed)
    model = settings.apply(base.model)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if config.mixed_precision != "no":
        cast_frozen(model, torch.bfloat16 if config.mixed_precision == "bf16" else torch.float16)
    score = validation_score(valid, base.tokenizer, batch_size=at_a_time, workers=config.workers)
    if accelerator_for().is_main_process:
        trained, total = count_trainable(model), sum(p.numel() for p in model.parameters())
        steps = config.steps_for(len(train))
        passes, validations = steps * config.batch_size / len(train), 1 - (-steps // config.evaluate_every)
        print(
            f"training {trained:,} of {total:,} parameters: {steps} steps of {config.batch_size} volumes "
            f"({passes:.1f} passes over {len(train):,} studies), {validations} validations on {len(valid):,}",
            flush=True,
        )
    result = finetune(model, studies, base.tokenizer, config, output_dir, score)
    if accelerator_for().is_main_process:
        write_json(asdict(origin), output_dir / ORIGIN)  # now that the folder is this run's
        if result.best_step == 0:
            print("no step was better on the validation studies than the base model: the adapter is an untrained one")
    return result
