"""Fine-tuning: the settings and the one training loop.

What is minimised is in `objectives`, how the gradient of one step is computed in `gradients`, what is kept between two
steps in `checkpoints`.
"""

from __future__ import annotations

import math
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

from medctkit.cohort.dataset import collate
from medctkit.common.atomic import replacing
from medctkit.common.processes import accelerator_for
from medctkit.lora.methods import save_trained
from medctkit.training import checkpoints
from medctkit.training.checkpoints import Progress
from medctkit.training.gradients import Objective, refuse_non_finite, seed_from, step_gradients
from medctkit.training.objectives import draw_prompts
from medctkit.training.settings import FineTuneConfig

if TYPE_CHECKING:
    import pandas as pd
    from accelerate import Accelerator


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
    norm before clipping, seconds since the start, and `score` where validated. The best parameters are in
    `adapter_dir` and on the model.
    """

    history: pd.DataFrame = field(repr=False)
    best_step: int
    best_score: float
    adapter_dir: Path
    seconds: float


class StepBatches(Sampler):
    """Indices of one process's small batches, step after step: each epoch a new order, drawn from seed and epoch.

    Args:
        studies: how many there are.
        config: batch sizes and seed.
        steps: numbers of the optimiser steps, from 1.
        process: which of the processes.
        processes: how many share each batch.
    """

    def __init__(self, studies: int, config: FineTuneConfig, steps: range, process: int = 0, processes: int = 1):
        self.studies, self.config, self.steps = studies, config, steps
        self.process, self.share = process, config.batch_size // processes
        self.size = min(config.micro_batch_size or self.share, self.share)
        self.parts = self.share // self.size

    def __len__(self) -> int:
        return len(self.steps) * self.parts * self.rounds

    @property
    def rounds(self) -> int:
        """How often `step_gradients` reads each small batch."""
        return 1 if self.parts == 1 else 2

    def batch(self, step: int) -> list[int]:
        """Indices of a step's whole batch, of all processes."""
        epoch, place = divmod(step - 1, self.studies // self.config.batch_size)
        generator = torch.Generator().manual_seed(seed_from(self.config.seed, "epoch", epoch))
        order = torch.randperm(self.studies, generator=generator)
        return order[place * self.config.batch_size :][: self.config.batch_size].tolist()

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            share = self.batch(step)[self.process * self.share :][: self.share]
            for _ in range(self.rounds):
                yield from (share[i : i + self.size] for i in range(0, self.share, self.size))


def finetune(
    model: nn.Module,
    train_dataset: Dataset,
    tokenizer: Any,
    config: FineTuneConfig,
    output_dir: str | os.PathLike,
    score_fn: Callable[[nn.Module], float],
    callback: Callable[[dict[str, float]], None] | None = None,
) -> FineTuneResult:
    """Train what is trainable in `model`, usually an adapter; keep what scores best on validation data.

    Only parameters that require gradients change; all else stays as it is, bit for bit, the codebook included. Stopped
    in the middle, by whatever, the same call goes on from the last checkpoint: on a CPU to the same bits, as if
    nothing had happened. Under `accelerate launch` several processes share each batch.

    Args:
        model: CT-CLIP with an adapter, from `add_lora`, or made ready by `methods.apply_method`.
        train_dataset: items as `CTReportDataset` gives them.
        tokenizer: of the text encoder.
        config: settings.
        output_dir: gets `adapter` (the best parameters so far), `history.csv`, TensorBoard's files in `tensorboard`,
            and, while the run is not finished, its checkpoint.
        score_fn: called with the model in evaluation mode and without gradients, in every process; returns the number
            to maximise, such as the mean zero-shot AUROC of the validation split. Never show it a test study.
        callback: called with each row of the history as it is made, for live plots; rows of before an interruption
            come first.

    Raises:
        ValueError: nothing to train, fewer studies than one batch, a batch that the processes cannot share equally,
            a score that is not a number, a checkpoint of another run.
        RuntimeError: no gradient reaches the vision encoder's trainable parameters.
        FloatingPointError: a loss or gradient that is not finite, with step and study ids.
    """
    import pandas as pd
    from accelerate.utils import broadcast, broadcast_object_list
    from tqdm.auto import tqdm

    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError("the model has no trainable adapter; make one with add_lora(model, 'paper')")
    if len(train_dataset) < config.batch_size:
        raise ValueError(f"{len(train_dataset)} training studies are fewer than one batch of {config.batch_size}")
    accelerator, output_dir = accelerator_for(config.mixed_precision, output_dir), Path(output_dir)
    processes = accelerator.num_processes
    if config.batch_size % processes or (config.batch_size // processes) % (config.micro_batch_size or 1):
        raise ValueError(
            f"a batch of {config.batch_size} in small batches of {config.micro_batch_size or 'any size'} cannot be "
            f"shared equally by {processes} processes; choose a batch_size that can"
        )
    steps = config.steps or max(1, round(config.epochs * (len(train_dataset) // config.batch_size)))

    model.to(accelerator.device)
    for parameter in trainable.values():
        broadcast(parameter.data)  # all processes start from the first one's
    optimizer = torch.optim.AdamW(trainable.values(), lr=config.learning_rate, weight_decay=config.weight_decay)
    prepared = accelerator.prepare_optimizer(optimizer)  # for fp16's loss scale
    objective = Objective(config.contrastive_weight, config.prompt_weight)
    checkpoint, adapter_dir = output_dir / checkpoints.NAME, output_dir / "adapter"
    made_of = checkpoints.made_of(model, trainable, train_dataset, asdict(config))
    if accelerator.is_main_process:
        _remove_half_written(output_dir)
    state = Progress(0, [], -1, -math.inf, {}, 0.0)
    found = _read_checkpoint(checkpoint, made_of, accelerator)
    if found is not None:
        state = checkpoints.restore(*found, trainable, optimizer, accelerator.scaler)
    started = time.perf_counter() - state.seconds
    # rows that an interrupted run logged after its last checkpoint are logged anew
    accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": state.step + 1}})

    def keep() -> None:
        """Write down where the run stands."""
        state.seconds = time.perf_counter() - started
        if accelerator.is_main_process:
            checkpoints.save(checkpoint, state, trainable, optimizer, accelerator.scaler, made_of)

    def validate(step: int) -> float:
        model.eval()
        with torch.no_grad(), accelerator.autocast():
            score = float(score_fn(model))
        model.train()  # the quantiser passes gradients in training mode only
        (score,) = broadcast_object_list([score])  # so that all processes keep and stop alike
        if not math.isfinite(score):
            raise ValueError(f"score_fn returned {score} at step {step}; expected a finite number to maximise")
        if score > state.best_score:
            state.best_step, state.best_score = step, score
            state.best = {name: p.detach().clone() for name, p in trainable.items()}
            if accelerator.is_main_process:
                save_trained(model, adapter_dir)
        return score

    def record(row: dict[str, float]) -> None:
        state.history.append(row | {"seconds": time.perf_counter() - started})
        accelerator.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])
        if callback is not None:
            callback(state.history[-1])

    for row in state.history if callback is not None else ():
        callback(row)
    if not state.history:
        record({"step": 0, "score": validate(0)})
    model.train()
    batches = StepBatches(
        len(train_dataset), config, range(state.step + 1, steps + 1), accelerator.process_index, processes
    )
    loader = iter(
        DataLoader(
            train_dataset,
            batch_sampler=batches,
            collate_fn=collate(tokenizer, config.max_length),
            num_workers=config.workers,
        )
    )
    bar = tqdm(
        total=steps, initial=state.step, desc="fine-tuning", unit="step", disable=not accelerator.is_local_main_process
    )
    while state.step < steps and not _patience_is_over(state, config):
        step = state.step + 1
        rate = config.learning_rate * learning_rate_factor(step - 1, steps, config.warmup_fraction)
        prompts = None
        if config.prompt_weight:
            prompts = draw_prompts(config.prompts, tokenizer, random.Random(seed_from(config.seed, step, "wordings")))
        losses = step_gradients(
            model, loader, batches.parts, objective, accelerator, prompts, seed=config.seed, step=step
        )
        if step == 1:
            _refuse_silent_vision(trainable)
        norm = accelerator.clip_grad_norm_(list(trainable.values()), config.max_grad_norm)
        if config.mixed_precision != "fp16" and not norm.isfinite():  # fp16 skips infinities, to find its scale
            studies = [train_dataset[i]["study"] for i in batches.batch(step)]
            refuse_non_finite("gradient norm", norm, step, studies)
        for group in optimizer.param_groups:
            group["lr"] = rate
        prepared.step()
        prepared.zero_grad()

        row = {name: value.item() for name, value in losses.items()}
        row = {"step": step} | row | {"learning_rate": rate, "grad_norm": norm.item()}
        if step % config.evaluate_every == 0 or step == steps:
            row["score"] = validate(step)
        record(row)
        state.step = step
        if step % config.checkpoint_every == 0 or step == steps:
            keep()
        bar.update()
        bar.set_postfix(loss=f"{row['loss']:.3f}", best=f"{state.best_score:.3f} at step {state.best_step}")
    bar.close()

    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(state.best[name])
    model.eval()
    history = pd.DataFrame(state.history)
    if accelerator.is_main_process:
        save_trained(model, adapter_dir)  # what an interrupted run left there may be of a later step
        with replacing(output_dir / "history.csv") as temporary:
            history.to_csv(temporary, index=False)
        checkpoint.unlink(missing_ok=True)
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.wait_for_everyone()
    return FineTuneResult(history, state.best_step, state.best_score, adapter_dir, time.perf_counter() - started)


def _remove_half_written(output_dir: Path) -> None:
    """What a run that was killed while it wrote has left under temporary names."""
    for file in (*output_dir.glob(f".{checkpoints.NAME}.*.tmp"), *output_dir.glob("adapter/.*.tmp")):
        file.unlink()
    for folder in output_dir.glob("adapter/.saving-*"):
        shutil.rmtree(folder)


def _read_checkpoint(path: Path, made_of: dict, accelerator: Accelerator) -> tuple | None:
    """The main process reads, all get it; or all fail."""
    from accelerate.utils import broadcast_object_list

    found = None
    if accelerator.is_main_process and path.is_file():
        try:
            found = checkpoints.read(path, made_of)
        except ValueError as error:
            found = error
    (found,) = broadcast_object_list([found])
    if isinstance(found, ValueError):
        raise found
    return found


def _patience_is_over(state: Progress, config: FineTuneConfig) -> bool:
    without_best = sum("score" in row and row["step"] > state.best_step for row in state.history)
    return config.patience is not None and without_best >= config.patience


def _refuse_silent_vision(trainable: Mapping[str, nn.Parameter]) -> None:
    vision = [p for name, p in trainable.items() if "visual_transformer." in name]
    if vision and not any(p.grad is not None and p.grad.any() for p in vision):
        raise RuntimeError(
            "no gradient reached the vision encoder's trainable parameters in the first step, so it would never learn. "
            "The vector quantiser passes gradients straight through in training mode only: see that nothing "
            "puts the vision encoder into evaluation mode or detaches encode_image"
        )
