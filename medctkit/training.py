"""Fine-tuning: two objectives and the one training loop.

Both objectives work on L2-normalised embeddings, `b` volumes and their reports:

* contrastive, `contrastive_loss`: each volume has to find its own report among the batch's reports and the
  other way round (InfoNCE in both directions; CLIP, Radford et al. 2021, arXiv 2103.00020; CT-CLIP, Hamamci
  et al. 2024, arXiv 2403.17834);
* per-finding prompts, `finding_prompt_loss`: for each of the 18 findings the volume has to be nearer to a
  sentence that states the finding than to one that denies it, or the reverse (the idea of CT-CLIP's
  VocabFine). The sentences are report wordings; the prompts of the zero-shot evaluation are refused here, so
  that evaluation stays zero-shot.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from medctkit.dataset import collate
from medctkit.findings import FINDINGS
from medctkit.lora import save_adapter
from medctkit.reports import finding_sentences

if TYPE_CHECKING:
    import pandas as pd
    from peft import PeftModel

Prompts = Mapping[str, tuple[Sequence[str], Sequence[str]]]


def contrastive_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    temperature: torch.Tensor | float,
    groups: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean of the two InfoNCE directions.

    Args:
        image_embeds: (b, p), L2-normalised.
        text_embeds: (b, p), L2-normalised; row i belongs to image i.
        temperature: as CT-CLIP stores it: cosines are multiplied by exp(temperature).
        groups: (b,) whole numbers; equal for volumes with the same report, such as two reconstructions of one
            scan. Such a pair is right, not wrong, so it is left out of each other's negatives. None: all
            different.
    """
    logits = image_embeds @ text_embeds.T * torch.as_tensor(temperature).exp()  # (b, p) (p, b) -> (b, b)
    own = torch.arange(len(logits), device=logits.device)
    if groups is not None:
        same = groups[:, None] == groups[None, :]
        same[own, own] = False
        logits = logits.masked_fill(same, -math.inf)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def finding_prompt_loss(
    image_embeds: torch.Tensor,
    positive_embeds: torch.Tensor,
    negative_embeds: torch.Tensor,
    labels: torch.Tensor,
    scale: torch.Tensor | float,
) -> torch.Tensor:
    """Cross-entropy of the softmax over each finding's two similarities, averaged over volumes and findings.

    The softmax of two numbers is the sigmoid of their difference, hence the binary form.

    Args:
        image_embeds: (b, p), L2-normalised.
        positive_embeds: (18, p), sentences that state each finding, L2-normalised.
        negative_embeds: (18, p), sentences that deny it.
        labels: (b, 18), 1 present, 0 absent.
        scale: factor on the cosines, exp(temperature) for CT-CLIP.
    """
    margin = scale * image_embeds @ (positive_embeds - negative_embeds).T  # (b, p) (p, 18) -> (b, 18)
    return F.binary_cross_entropy_with_logits(margin, labels.to(margin.dtype))


def report_prompts(hospital: str = "target") -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Wordings in which `hospital`'s reports state and deny each finding: {finding: (stated, denied)}."""
    return {f: (finding_sentences(f, True, hospital), finding_sentences(f, False, hospital)) for f in FINDINGS}


@dataclass(frozen=True)
class FineTuneConfig:
    """Settings of `finetune`, checked on construction.

    LoRA stands, and needs, a learning rate about ten times that of full fine-tuning: start between 1e-4 and
    1e-3 and halve it where the loss jumps. alpha multiplies the update too: with alpha = 2 r the rate can
    stay as it is when r changes.

    Args:
        steps: optimiser steps; give this or `epochs`.
        epochs: passes over the training data (may be fractional).
        batch_size: volumes per forward pass; also how many reports a volume is told apart from.
        accumulation: forward passes per optimiser step.
        learning_rate: its peak, after warm-up; falls to zero along a cosine.
        warmup_fraction: share of all steps in which the rate rises, 0 to below 1.
        weight_decay: AdamW's.
        max_grad_norm: longer gradients are scaled down to this norm.
        contrastive_weight: weight of `contrastive_loss`.
        prompt_weight: weight of `finding_prompt_loss`.
        prompts: for each of the 18 findings, sentences that state and that deny it; every forward pass draws
            one of each. Not the prompts of the zero-shot evaluation.
        max_length: tokens a report is cut to.
        evaluate_every: optimiser steps between validations.
        patience: stop after this many validations in a row without a new best; None: never.
        mixed_precision: "no", "bf16" or "fp16".
        seed: of batches, prompt wordings and dropout.
    """

    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 16
    accumulation: int = 1
    learning_rate: float = 5e-4
    warmup_fraction: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    contrastive_weight: float = 1.0
    prompt_weight: float = 1.0
    prompts: Prompts = field(default_factory=report_prompts, repr=False)
    max_length: int = 128
    evaluate_every: int = 25
    patience: int | None = None
    mixed_precision: str = "no"
    seed: int = 0

    def __post_init__(self):
        def require(ok: bool, name: str, expected: str) -> None:
            if not ok:
                raise ValueError(f"FineTuneConfig.{name} must be {expected}, got {getattr(self, name)!r}")

        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"give either steps or epochs, got steps={self.steps!r} and epochs={self.epochs!r}")
        require(self.steps is None or self.steps >= 1, "steps", "at least 1")
        require(self.epochs is None or self.epochs > 0, "epochs", "above 0")
        for name in ("batch_size", "accumulation", "max_length", "evaluate_every"):
            require(getattr(self, name) >= 1, name, "at least 1")
        require(self.patience is None or self.patience >= 1, "patience", "at least 1, or None")
        for name in ("learning_rate", "max_grad_norm"):
            require(0 < getattr(self, name) < math.inf, name, "a number above 0")
        require(0 <= self.warmup_fraction < 1, "warmup_fraction", "at least 0 and below 1")
        for name in ("weight_decay", "contrastive_weight", "prompt_weight"):
            require(0 <= getattr(self, name) < math.inf, name, "a number of at least 0")
        require(self.mixed_precision in ("no", "bf16", "fp16"), "mixed_precision", "'no', 'bf16' or 'fp16'")
        if self.contrastive_weight == self.prompt_weight == 0:
            raise ValueError("contrastive_weight and prompt_weight are both 0: nothing to learn from; raise one")
        if self.contrastive_weight > 0 and self.batch_size < 2:
            raise ValueError(
                "batch_size must be at least 2 for the contrastive objective, which tells a report from the "
                f"others in its batch; got {self.batch_size}. Raise it, or set contrastive_weight=0"
            )
        if self.prompt_weight > 0:
            _check_prompts(self.prompts)


def _check_prompts(prompts: Prompts) -> None:
    missing = [f for f in FINDINGS if f not in prompts or not all(prompts[f])]
    if missing:
        raise ValueError(
            f"prompts need sentences that state and that deny every finding; none for {', '.join(missing)}. "
            "report_prompts() is a complete set"
        )
    for finding in FINDINGS:
        evaluation = {f"{finding} is present".lower(), f"{finding} is not present".lower()}
        for sentence in (*prompts[finding][0], *prompts[finding][1]):
            if sentence.strip().rstrip(".").lower() in evaluation:
                raise ValueError(
                    f"training prompt {sentence!r} is a prompt of the zero-shot evaluation, which would no "
                    "longer be zero-shot; use other wordings, such as report_prompts()"
                )


class Objective(nn.Module):
    """Model and losses as one module, so that several processes share a single forward call."""

    def __init__(self, model: nn.Module, contrastive_weight: float, prompt_weight: float):
        super().__init__()
        self.model = model
        self.contrastive_weight = contrastive_weight
        self.prompt_weight = prompt_weight

    def forward(self, batch: Mapping[str, Any], prompts: Mapping[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
        """Losses `contrastive`, `prompts` (those with a weight) and their weighted sum `loss`."""
        images = self.model.encode_image(batch["pixel_values"])  # (b, p)
        temperature = self.model.temperature
        losses, total = {}, 0.0
        if self.contrastive_weight:
            texts = self.model.encode_text(batch["input_ids"], batch["attention_mask"])  # (b, p)
            groups = torch.unique(batch["input_ids"], dim=0, return_inverse=True)[1]  # same tokens, same report
            losses["contrastive"] = contrastive_loss(images, texts, temperature, groups)
            total = total + self.contrastive_weight * losses["contrastive"]
        if self.prompt_weight:
            stated, denied = self.model.encode_text(**prompts).chunk(2)  # (36, p) -> 2 of (18, p)
            losses["prompts"] = finding_prompt_loss(images, stated, denied, batch["labels"], temperature.exp())
            total = total + self.prompt_weight * losses["prompts"]
        return losses | {"loss": total}


def learning_rate_factor(step: int, steps: int, warmup_fraction: float) -> float:
    """Share of the peak learning rate at `step` (from 0): linear warm-up, then a cosine down to zero."""
    warmup = round(warmup_fraction * steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@dataclass(frozen=True)
class FineTuneResult:
    """What `finetune` found.

    `history` has one row per optimiser step (step 0: before training) with losses, learning rate, gradient
    norm before clipping, seconds since the start, and `score` where validated. The best adapter is in
    `adapter_dir` and on the model.
    """

    history: pd.DataFrame = field(repr=False)
    best_step: int
    best_score: float
    adapter_dir: Path
    seconds: float


def finetune(
    model: PeftModel,
    train_dataset: Dataset,
    tokenizer: Any,
    config: FineTuneConfig,
    output_dir: str | os.PathLike,
    score_fn: Callable[[nn.Module], float],
    callback: Callable[[dict[str, float]], None] | None = None,
) -> FineTuneResult:
    """Train the adapter of `model`; keep the one that scores best on validation data.

    Only parameters that require gradients change; the base stays as it is, bit for bit, the codebook
    included.

    Args:
        model: CT-CLIP with an adapter, from `add_lora`.
        train_dataset: items as `CTReportDataset` gives them.
        tokenizer: of the text encoder.
        config: settings.
        output_dir: the best adapter is written to its `adapter` folder, whole or not at all.
        score_fn: called with the model in evaluation mode and without gradients; returns the number to
            maximise, such as the mean zero-shot AUROC of the validation split. Never show it a test study.
        callback: called with each row of the history as it is made, for live plots.

    Raises:
        ValueError: no adapter, fewer studies than one batch, or a score that is not a number.
        RuntimeError: no gradient reaches the vision encoder's adapter.
        FloatingPointError: a loss or gradient that is not finite, with step and study ids.
    """
    import pandas as pd
    from accelerate import Accelerator
    from accelerate.utils import set_seed
    from tqdm.auto import tqdm

    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not hasattr(model, "peft_config") or not trainable:
        raise ValueError("the model has no trainable adapter; make one with add_lora(model, 'paper')")
    if len(train_dataset) < config.batch_size:
        raise ValueError(f"{len(train_dataset)} training studies are fewer than one batch of {config.batch_size}")

    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    set_seed(config.seed)
    wordings = random.Random(config.seed)
    loader = DataLoader(
        train_dataset,
        batch_size=config.batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=collate(tokenizer, config.max_length),
        generator=torch.Generator().manual_seed(config.seed),
    )
    optimizer = torch.optim.AdamW(trainable.values(), lr=config.learning_rate, weight_decay=config.weight_decay)
    objective = Objective(model, config.contrastive_weight, config.prompt_weight)
    objective, optimizer, loader = accelerator.prepare(objective, optimizer, loader)
    steps = config.steps or max(1, round(config.epochs * math.ceil(len(loader) / config.accumulation)))

    adapter_dir = Path(output_dir) / "adapter"
    started = time.perf_counter()
    history: list[dict[str, float]] = []
    best: dict[str, Any] = {"step": -1, "score": -math.inf}

    def validate(step: int) -> float:
        objective.eval()
        with torch.no_grad():
            score = float(score_fn(model))
        objective.train()  # the quantiser passes gradients in training mode only
        if not math.isfinite(score):
            raise ValueError(f"score_fn returned {score} at step {step}; expected a finite number to maximise")
        if score > best["score"]:
            best.update(step=step, score=score, weights={n: p.detach().clone() for n, p in trainable.items()})
            if accelerator.is_main_process:
                save_adapter(model, adapter_dir, model.active_adapter)
        return score

    def record(row: dict[str, float]) -> None:
        history.append(row | {"seconds": time.perf_counter() - started})
        if callback is not None:
            callback(history[-1])

    record({"step": 0, "score": validate(0)})
    batches = _endless(loader)
    without_best = 0
    bar = tqdm(range(1, steps + 1), desc="fine-tuning", disable=not accelerator.is_local_main_process)
    for step in bar:
        rate = config.learning_rate * learning_rate_factor(step - 1, steps, config.warmup_fraction)
        row: dict[str, float] = {"step": step}
        for part in range(config.accumulation):
            batch = next(batches)
            prompts = None
            if config.prompt_weight:
                prompts = draw_prompts(config.prompts, tokenizer, wordings).to(accelerator.device)
            last = part == config.accumulation - 1  # several processes average their gradients once per step
            with nullcontext() if last else accelerator.no_sync(objective):
                losses = objective(batch, prompts)
                _refuse_non_finite("loss", losses["loss"], step, batch)
                accelerator.backward(losses["loss"] / config.accumulation)
            for name, value in losses.items():
                row[name] = row.get(name, 0.0) + value.item() / config.accumulation
        if step == 1:
            _refuse_silent_vision(trainable)
        norm = accelerator.clip_grad_norm_(list(trainable.values()), config.max_grad_norm)
        if config.mixed_precision != "fp16":  # fp16 looks for its scale through infinities and skips those
            _refuse_non_finite("gradient norm", norm, step, batch)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()

        row |= {"learning_rate": rate, "grad_norm": norm.item()}
        if step % config.evaluate_every == 0 or step == steps:
            row["score"] = validate(step)
            without_best = 0 if best["step"] == step else without_best + 1
        record(row)
        bar.set_postfix(loss=f"{row['loss']:.3f}", best=f"{best['score']:.3f} at step {best['step']}")
        if without_best == config.patience:
            break
    bar.close()

    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(best["weights"][name])
    model.eval()
    return FineTuneResult(
        history=pd.DataFrame(history),
        best_step=best["step"],
        best_score=best["score"],
        adapter_dir=adapter_dir,
        seconds=time.perf_counter() - started,
    )


def _endless(loader):
    while True:
        yield from loader


def draw_prompts(prompts: Prompts, tokenizer: Any, wordings: random.Random) -> Mapping[str, torch.Tensor]:
    """One stating sentence per finding, then one denying sentence per finding, as tokens (36, n)."""
    sentences = [wordings.choice(prompts[finding][side]) for side in (0, 1) for finding in FINDINGS]
    tokens = tokenizer(sentences, padding=True, return_tensors="pt")
    tokens.pop("token_type_ids", None)
    return tokens


def _refuse_non_finite(what: str, value: torch.Tensor, step: int, batch: Mapping[str, Any]) -> None:
    if not torch.isfinite(value).all():
        raise FloatingPointError(
            f"{what} is {value.item():g} at step {step}, studies {', '.join(map(str, batch['study']))}. "
            "Look at these volumes for values outside [-1, 1], lower learning_rate, or train in float32"
        )


def _refuse_silent_vision(trainable: Mapping[str, nn.Parameter]) -> None:
    vision = [p for name, p in trainable.items() if "visual_transformer." in name]
    if vision and not any(p.grad is not None and p.grad.any() for p in vision):
        raise RuntimeError(
            "no gradient reached the vision encoder's adapter in the first step, so it would never learn. "
            "The vector quantiser passes gradients straight through in training mode only: see that nothing "
            "puts the vision encoder into evaluation mode or detaches encode_image"
        )
