"""The settings of a fine-tuning run. They are declared here and nowhere else."""

import inspect
import math
import re
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from medctkit.training.objectives import Prompts, check_prompts, report_prompts


@dataclass(frozen=True)
class FineTuneConfig:
    """Settings of `finetune`, checked on construction.

    LoRA stands, and needs, a learning rate about ten times that of full fine-tuning (Biderman et al. 2024, "LoRA
    Learns Less and Forgets Less", arXiv 2405.09673): sweep it by factors of 3, from 1e-4 on;
    where the loss jumps, go lower.
    What was best for each method here is in the table of `medctkit compare`.

    Args:
        steps: optimiser steps; give this or `epochs`.
        epochs: passes over the training data (may be fractional).
        batch_size: volumes per optimiser step, over all processes; also how many of them the losses compare.
        micro_batch_size: volumes in memory at a time, in each process; None: the process's whole share of the batch.
            Gradients are the same, for one more forward pass.
        learning_rate: its peak, after warm-up; falls to zero along a cosine.
        warmup_fraction: share of all steps in which the rate rises, 0 to below 1.
        rate_of_b: factor on the learning rate of LoRA's B matrices, which start at zero; LoRA+ has 16 (Hayou et al.
            2024, arXiv 2402.12354).
        weight_decay: AdamW's.
        max_grad_norm: longer gradients are scaled down to this norm.
        contrastive_weight: weight of `contrastive_loss`.
        prompt_weight: weight of `finding_prompt_loss`.
        prevalence: let that loss also fit how common each finding is, which moves scores and orders none. Without it
            their level is not trained: choose thresholds, or recalibrate, on validation patients.
        anchor_weight: weight of the mean distance, 1 - cosine, of each volume's embedding from its `anchor`, the base
            model's, which each study of the data set then has to have.
        prompts: for each of the 18 findings, sentences that state and that deny it; every step draws one of each. Not
            the prompts of the evaluation.
        max_length: tokens a report is cut to.
        evaluate_every: optimiser steps between validations.
        checkpoint_every: optimiser steps between checkpoints, from which an interrupted run goes on.
        patience: stop after this many validations in a row without a new best; None: never.
        mixed_precision: "no", "bf16", "fp16", or "auto": what the device is quick at.
        seed: of batches, prompt wordings and dropout.
        workers: processes that load volumes ahead; 0: none, right for data in memory.
        tracker: who gets the curves: "tensorboard" (where it is installed), or another that accelerate knows, such as
            "wandb"; "none".
    """

    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 16
    micro_batch_size: int | None = None
    learning_rate: float = 5e-4
    rate_of_b: float = 1.0
    warmup_fraction: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    contrastive_weight: float = 1.0
    prompt_weight: float = 1.0
    prevalence: bool = False
    anchor_weight: float = 0.0
    prompts: Prompts = field(default_factory=report_prompts, repr=False)
    max_length: int = 128
    evaluate_every: int = 25
    checkpoint_every: int = 25
    patience: int | None = None
    mixed_precision: str = "no"
    seed: int = 0
    workers: int = 0
    tracker: str = "tensorboard"

    def __post_init__(self) -> None:
        def require(ok: bool, name: str, expected: str) -> None:
            if not ok:
                raise ValueError(f"FineTuneConfig.{name} must be {expected}, got {getattr(self, name)!r}")

        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"give either steps or epochs, got steps={self.steps!r} and epochs={self.epochs!r}")
        require(self.steps is None or self.steps >= 1, "steps", "at least 1")
        require(self.epochs is None or 0 < self.epochs < math.inf, "epochs", "a number above 0")
        for name in ("batch_size", "max_length", "evaluate_every", "checkpoint_every"):
            require(getattr(self, name) >= 1, name, "at least 1")
        micro, divisor = self.micro_batch_size, f"None or a divisor of batch_size {self.batch_size}"
        require(micro is None or (micro >= 1 and self.batch_size % micro == 0), "micro_batch_size", divisor)
        require(self.workers >= 0, "workers", "at least 0")
        require(0 <= self.seed < 2**63, "seed", "from 0 to 2**63 - 1")
        require(self.patience is None or self.patience >= 1, "patience", "at least 1, or None")
        for name in ("learning_rate", "rate_of_b", "max_grad_norm"):
            require(0 < getattr(self, name) < math.inf, name, "a number above 0")
        require(0 <= self.warmup_fraction < 1, "warmup_fraction", "at least 0 and below 1")
        for name in ("weight_decay", "contrastive_weight", "prompt_weight", "anchor_weight"):
            require(0 <= getattr(self, name) < math.inf, name, "a number of at least 0")
        precisions = ("no", "bf16", "fp16", "auto")
        require(self.mixed_precision in precisions, "mixed_precision", "'no', 'bf16', 'fp16' or 'auto'")
        if self.contrastive_weight == self.prompt_weight == 0:
            raise ValueError("contrastive_weight and prompt_weight are both 0: nothing to learn from; raise one")
        if self.contrastive_weight > 0 and self.batch_size < 2:
            raise ValueError(
                "batch_size must be at least 2 for the contrastive objective, which tells a report from the "
                f"others in its batch; got {self.batch_size}. Raise it, or set contrastive_weight=0"
            )
        if self.prompt_weight > 0:
            if self.batch_size < 2 and not self.prevalence:
                raise ValueError(
                    "batch_size must be at least 2 for the per-finding loss, which tells volumes that have a finding "
                    "from the others in their batch; got 1. Raise it, or set prevalence=True"
                )
            check_prompts(self.prompts)

    def values(self, *without: str) -> dict[str, Any]:
        """The settings that are declared here by name, apart from some."""
        return {f.name: getattr(self, f.name) for f in fields(FineTuneConfig) if f.name not in without}

    def steps_for(self, studies: int) -> int:
        """Optimiser steps on that many training studies."""
        if self.epochs is None:
            return self.steps or 0
        return max(1, round(self.epochs * (studies // self.batch_size)))

    def for_this_device(self) -> "FineTuneConfig":
        """The same with "auto" decided: bf16 on a GPU that computes in it, fp16 on an older one (T4), on a CPU "no"."""
        if self.mixed_precision != "auto":
            return self
        if not torch.cuda.is_available():
            return replace(self, mixed_precision="no")
        quick = torch.cuda.is_bf16_supported(including_emulation=False)
        return replace(self, mixed_precision="bf16" if quick else "fp16")

    @classmethod
    def help(cls) -> dict[str, str]:
        """What the docstring says about each setting, in one line each; for command-line options."""
        texts = {}
        for each in reversed(cls.__mro__[:-1]):
            arguments = (inspect.getdoc(each) or "").partition("Args:\n")[2]
            for name, text in re.findall(r"^    (\w+): (.+(?:\n {8}.+)*)", arguments, re.M):
                texts[name] = " ".join(text.split())
        return texts
