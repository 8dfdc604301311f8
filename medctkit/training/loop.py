"""Fine-tuning: the one training loop, to be read from top to bottom.

What is minimised is in `objectives`, the memory-saving half of the gradient in `gradients`, which studies a step sees
in `batches`. Beside the loop: what an interrupted run goes on from (`checkpoints`), and what is told (`history`).
"""

import math
import os
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list
from torch.utils.data import DataLoader

from medctkit.cohort.dataset import collate
from medctkit.common.processes import accelerator_for
from medctkit.model.protocol import Model
from medctkit.training.batches import StepBatches
from medctkit.training.checkpoints import HISTORY, Run, made_of
from medctkit.training.gradients import EmbeddedBatch, refuse_non_finite, seed_from
from medctkit.training.history import History
from medctkit.training.objectives import draw_prompts, joint_loss
from medctkit.training.settings import FineTuneConfig


def learning_rate_factor(step: int, steps: int, warmup_fraction: float) -> float:
    """Share of the peak learning rate at `step` (from 0): linear warm-up, then a cosine down to zero."""
    warmup = round(warmup_fraction * steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@dataclass(frozen=True)
class FineTuneResult:
    """What `finetune` found.

    `history` has one row per optimiser step (step 0: before training); `grad_norm` is before clipping. The best
    parameters are in `adapter_dir` and on the model.
    """

    history: pd.DataFrame = field(repr=False)
    best_step: int
    best_score: float
    adapter_dir: Path
    seconds: float

    @classmethod
    def of(cls, run: Run) -> "FineTuneResult":
        """The result of a finished run."""
        table = pd.DataFrame(run.history)
        return cls(table, run.best_step, run.best_score, run.adapter_dir, table["seconds"].iloc[-1])


def finetune(
    model: Model,
    train_dataset: Any,
    tokenizer: Any,
    config: FineTuneConfig,
    output_dir: str | os.PathLike,
    score_fn: Callable[[Model], float],
    callback: Callable[[dict[str, float]], None] | None = None,
) -> FineTuneResult:
    """Train what is trainable in `model`, usually an adapter; keep what scores best on validation data.

    Only parameters that require gradients change; all else stays as it is, bit for bit, the codebook included. Stopped
    in the middle, by whatever, the same call goes on from the last checkpoint: on a CPU to the same bits, as if
    nothing had happened. Once it has ended, the same call gives its result again. Under `accelerate launch` several
    processes share each batch.

    Args:
        model: CT-CLIP with an adapter, from `add_lora`, or made ready by `methods.apply_method`.
        train_dataset: items as `CTReportDataset` gives them.
        tokenizer: of the text encoder.
        config: settings.
        output_dir: gets, when the run ends, `adapter` (the best parameters), `history.csv` and `run.json` (what it was
            made of); until then `unfinished`, with the best so far and the checkpoint. TensorBoard's files are in
            `tensorboard`, where it is installed.
        score_fn: called with the model in evaluation mode and without gradients, in every process; returns the number
            to maximise, such as the mean AUROC by prompts of the validation split. Never show it a test study.
        callback: called with each row of the history, for live plots; rows of before an interruption come first.

    Raises:
        ValueError: nothing to train, fewer studies than one batch, a batch that the processes cannot share equally,
            a score that is not a number; a folder of another run, or one where a run is at work.
        RuntimeError: no gradient reaches the vision encoder's trainable parameters.
        FloatingPointError: a loss or gradient that is not finite, with step and study ids.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError("the model has no trainable adapter; make one with add_lora(model, 'paper')")
    config, output_dir, studies = config.for_this_device(), Path(output_dir).expanduser(), len(train_dataset)
    accelerator = accelerator_for(config.mixed_precision, output_dir, config.tracker)
    model.to(accelerator.device)
    for parameter in trainable.values():
        broadcast(parameter.data)  # all processes start from the first one's
    factors = {name: config.rate_of_b if ".lora_B." in name else 1.0 for name in trainable}
    groups = [
        {"factor": factor, "params": [p for name, p in trainable.items() if factors[name] == factor]}
        for factor in sorted(set(factors.values()))
    ]
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay)
    optimizer = accelerator.prepare_optimizer(adamw)  # for fp16's loss scale
    run = Run(model, optimizer, accelerator, output_dir, made_of(model, train_dataset, config, tokenizer, score_fn))
    steps = config.steps_for(studies)
    with run.taken_up():
        if callback is not None:
            for row in run.history:
                callback(row)
        if run.finished:
            return FineTuneResult.of(run)
        left = range(run.step + 1, steps + 1)
        batches = StepBatches(studies, config, left, accelerator.process_index, accelerator.num_processes)
        loader = DataLoader(
            train_dataset,
            batch_sampler=batches,
            collate_fn=collate(tokenizer, config.max_length),
            num_workers=config.workers,
        )
        history = History(run, steps, callback)
        if not run.history:
            score = validate(model, score_fn, accelerator, 0)
            run.keep_if_best(0, score)
            history.add({"step": 0, "score": score})
        model.train()
        small_batches = iter(loader)

        for step in left:
            if config.patience is not None and run.validations_without_best >= config.patience:
                run.save()  # as at the last step
                break
            # forward and backward
            prompts = None
            if config.prompt_weight:
                prompts = draw_prompts(
                    config.prompts, tokenizer, random.Random(seed_from(config.seed, step, "wordings"))
                )
            losses = step_gradients(model, small_batches, batches.parts, config, accelerator, prompts, step)
            if step == 1:
                refuse_silent_vision(model)
            # clip, and move along the gradient
            norm = accelerator.clip_grad_norm_(list(trainable.values()), config.max_grad_norm)
            if config.mixed_precision != "fp16":  # fp16 skips infinities, to find its scale
                whole_batch = lambda step=step: [train_dataset[i]["study"] for i in batches.batch(step)]  # noqa: E731
                refuse_non_finite("gradient norm", norm, step, whole_batch)
            rate = config.learning_rate * learning_rate_factor(step - 1, steps, config.warmup_fraction)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["factor"]
            optimizer.step()
            optimizer.zero_grad()
            # validate, and write down where the run stands
            row = {"step": step} | {name: value.item() for name, value in losses.items()}
            row |= {"learning_rate": rate, "grad_norm": norm.item()}
            if step % config.evaluate_every == 0 or step == steps:
                row["score"] = validate(model, score_fn, accelerator, step)
                run.keep_if_best(step, row["score"])
            history.add(row)
            run.step = step
            if step % config.checkpoint_every == 0 or step == steps:
                run.save()

        history.close(output_dir / HISTORY)
        run.finish()
    accelerator.wait_for_everyone()
    return FineTuneResult.of(run)


def step_gradients(
    model: Model,
    small_batches: Iterator[Mapping[str, Any]],
    parts: int,
    config: FineTuneConfig,
    accelerator: Accelerator,
    prompts: Mapping[str, torch.Tensor] | None = None,
    step: int = 1,
) -> dict[str, torch.Tensor]:
    """One batch forward and backward: adds the gradient of its loss to `.grad` of everything trainable.

    Arguments are those of `gradients.EmbeddedBatch`.

    Returns:
        `contrastive`, `prompts`, `moved` (those with a weight) and `loss`, of the joint batch of all processes.

    Raises:
        FloatingPointError: the loss is not finite; names the step and this process's studies.
    """
    batch = EmbeddedBatch(model, small_batches, parts, config, accelerator, prompts, step)  # forward: (b, p) each
    losses = joint_loss(
        batch.images, batch.texts, batch.prompts, batch.known, model.temperature.float(),
        config.contrastive_weight, config.prompt_weight, config.anchor_weight, config.prevalence,
    )  # fmt: skip
    refuse_non_finite("loss", losses["loss"], step, batch.suspects)
    accelerator.backward(losses["loss"])  # from the loss back to the embeddings
    batch.backward()  # and from the embeddings through both encoders
    return {name: value.detach() for name, value in losses.items()}


def validate(model: Model, score_fn: Callable[[Model], float], accelerator: Accelerator, step: int) -> float:
    """The score of the model as it is, the same in all processes, so that they keep and stop alike."""
    model.eval()
    with torch.no_grad(), accelerator.autocast():
        score = float(score_fn(model))
    model.train()  # the quantiser passes gradients in training mode only
    (score,) = broadcast_object_list([score])
    if not math.isfinite(score):
        raise ValueError(f"score_fn returned {score} at step {step}; expected a finite number to maximise")
    return score


def refuse_silent_vision(model: Model) -> None:
    """Stop where the vision encoder has something to train and got no gradient."""
    vision = [p for p in model.vision_encoder.parameters() if p.requires_grad]
    if vision and not any(p.grad is not None and p.grad.any() for p in vision):
        raise RuntimeError(
            "no gradient reached the vision encoder's trainable parameters in the first step, so it would never learn. "
            "The vector quantiser passes gradients straight through in training mode only: see that nothing "
            "puts the vision encoder into evaluation mode or detaches encode_image"
        )
