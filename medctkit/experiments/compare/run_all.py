"""Ways to fine-tune, side by side under equal conditions: what they score, and what they cost.

What a run is stands in `runs`. Here all of them are done, each with its result in a file of its own, so that an
interrupted comparison goes on where it was; seconds and memory are measured after them. `results` reads and draws them.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from medctkit.cohort.dataset import CTReportDataset, collate, prepared_dir
from medctkit.cohort.manifest import load_manifest
from medctkit.common.atomic import replacing
from medctkit.common.csv_tables import write_table
from medctkit.common.processes import accelerator_for, worker_pool
from medctkit.common.provenance import made_with, write_json
from medctkit.experiments.compare.data import HELD_OUT, Data, parts, truth
from medctkit.experiments.compare.runs import (
    BASE,
    GROUPS,
    SETTINGS,
    Job,
    inputs_of,
    jobs,
    run_job,
    settings_of,
    tuned_for,
    tuning_jobs,
    unpacked,
)
from medctkit.findings import FINDINGS
from medctkit.lora.methods import METHODS, apply_method
from medctkit.metrics.bootstrap import mean_of_findings, metric_draws, patient_weights
from medctkit.model.base_model import load_mini_base
from medctkit.training.checkpoints import differences
from medctkit.training.loop import step_gradients
from medctkit.training.memory import PeakMemory
from medctkit.training.objectives import draw_prompts
from medctkit.training.settings import FineTuneConfig

if TYPE_CHECKING:
    import pandas as pd

_SECONDS = {"step": 0.38, "validation": 1.1, "start": 5}  # measured on two cores; for a guess of the time

_data: Data | tuple  # of a worker process: where to load it from, then what was loaded


def _start_worker(manifest_path: str | os.PathLike, cache_dir: Path, threads: int) -> None:
    global _data
    torch.set_num_threads(threads)
    _data = (manifest_path, cache_dir)


def _work(job: Job, settings: FineTuneConfig, made_of: dict, output_dir: Path) -> None:
    global _data
    if isinstance(_data, tuple):
        _data = Data.load(*_data)
    work_dir = output_dir / "work" / job.name
    with redirect_stderr(io.StringIO()):  # the bar of all runs is enough
        found = run_job(job, _data, settings, work_dir)
    run = {key: value for key, value in asdict(job).items() if key != "group"}
    studies = len(_data.train) if job.studies is None else job.studies
    run |= {"studies": 0 if job.method == BASE else studies, "settings": made_of}
    result_file(output_dir, job).parent.mkdir(parents=True, exist_ok=True)
    write_json(run | found | {"made_with": made_with(job.seed)}, result_file(output_dir, job))
    shutil.rmtree(work_dir, ignore_errors=True)


def result_file(output_dir: Path, job: Job) -> Path:
    """Where the result of a job is."""
    return output_dir / "runs" / f"{job.name}.json"


def read_result(output_dir: Path, job: Job, made_of: Mapping | None = None) -> dict[str, Any] | None:
    """The result of a job, None if there is none yet; one that is damaged or of other settings is a ValueError."""
    path = result_file(output_dir, job)
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        there = found["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result of this command ({error}); delete it to do that run again") from None
    different = [] if made_of is None else differences(there, made_of)
    if different:
        raise ValueError(
            f"{path} was made with other settings; choose another folder, or delete it. {'; '.join(different)}"
        )
    return found


def compare_methods(
    manifest_path: str | os.PathLike,
    output_dir: str | os.PathLike,
    groups: Sequence[str] = GROUPS,
    seeds: int = 3,
    settings: FineTuneConfig = SETTINGS,
    workers: int = 1,
    cache_dir: str | os.PathLike | None = None,
) -> Path:
    """Do all runs that are not there yet, measure seconds and memory, and write the tables; returns `output_dir`.

    Args:
        manifest_path: usually `data_manifest.csv`.
        output_dir: gets `runs` (a file for each run), and what `results.load_results` reads.
        groups: some of `GROUPS`; learning rates that they need are chosen in any case.
        seeds: runs of each.
        settings: of all runs.
        workers: processes side by side, each with its share of the cores, and its own training volumes in memory.
        cache_dir: see `prepared_dir`.

    Raises:
        ValueError: unknown group; results of other settings in `output_dir`.
        OSError: a worker process died.
    """
    from tqdm.auto import tqdm

    if unknown := [group for group in groups if group not in GROUPS]:
        raise ValueError(f"unknown group {unknown[0]!r}; choose from {', '.join(GROUPS)}")
    if seeds < 1 or workers < 1:
        raise ValueError(f"seeds and workers must be at least 1, got {seeds} and {workers}")
    output_dir, inputs = Path(output_dir), inputs_of(manifest_path)
    cache_dir = prepared_dir(manifest_path, output_dir, cache_dir)
    table = load_manifest(manifest_path)
    train, _, test, home = parts(table)
    studies, needed = len(train), tuned_for(groups)

    def wanted(chosen: Mapping[str, tuple[float, str]]) -> dict[str, Job]:
        listed = [*tuning_jobs(needed), *jobs(groups, seeds, chosen)]
        return {job.name: job for job in listed if (job.studies or 0) < studies}

    def missing(chosen: Mapping[str, tuple[float, str]]) -> list[tuple[Job, dict]]:
        made_of = [(job, settings_of(job, settings, inputs)) for job in wanted(chosen).values()]
        return [each for each in made_of if read_result(output_dir, *each) is None]

    some = {job.tuned: (job.learning_rate or 0.0, job.dialect) for job in tuning_jobs(needed)}  # as many with any other
    expected = some | _chosen(output_dir, needed)
    total, left = len(wanted(expected)), len(missing(expected))
    steps = settings.steps_for(studies)
    validations = 1 + steps / settings.evaluate_every
    each = _SECONDS["start"] + steps * _SECONDS["step"] + validations * _SECONDS["validation"]
    print(f"{total} runs, {total - left} of them there; about {left * each / 60:.0f} min left on two cores", flush=True)

    start_with = (manifest_path, cache_dir, max(1, (os.cpu_count() or 1) // workers))
    try:
        while todo := missing(_chosen(output_dir, needed)):  # twice: learning rates are chosen in between
            for rows in parts(table):
                CTReportDataset(rows, load_mini_base().preprocess_config, cache_dir).prepare()
            with worker_pool(workers, _start_worker, *start_with) as pool:
                futures = [pool.submit(_work, job, settings, made_of, output_dir) for job, made_of in todo]
                for future in tqdm(as_completed(futures), total=len(futures), desc="comparing", unit="run"):
                    future.result()  # the first that fails ends it
    except BrokenProcessPool:
        raise OSError(
            "a worker process died, most often for want of memory. Runs that were finished are kept: the same "
            "command goes on from here, if need be with fewer --jobs"
        ) from None
    shutil.rmtree(output_dir / "work", ignore_errors=True)
    collect(output_dir, test.to_dict("records"), home.to_dict("records"), seeds)
    if "methods" in groups and not (output_dir / "costs.csv").is_file():
        learnt_from = CTReportDataset(train, load_mini_base().preprocess_config, cache_dir)
        write_table(measure_costs(learnt_from, settings), output_dir / "costs.csv")
    return output_dir


def _chosen(output_dir: Path, tuned: Iterable[str]) -> dict[str, tuple[float, str]]:
    """By `Job.tuned` the learning rate and dialect of best validation AUROC, where the whole grid was run."""
    grids: dict[str, list[tuple[Job, dict | None]]] = {}
    for job in tuning_jobs(tuned):
        grids.setdefault(job.tuned, []).append((job, read_result(output_dir, job)))
    chosen = {}
    for name, grid in grids.items():
        if any(found is None for _, found in grid):
            continue
        stable = [(job, found["validation_auroc"]) for job, found in grid if found and "diverged" not in found]
        if not stable:
            method = grid[0][0].method
            raise ValueError(f"{name} diverged with every learning rate of its grid; lower METHODS[{method!r}]'s")
        best, _ = max(stable, key=lambda each: (each[1], -(each[0].learning_rate or 0)))  # of equals the lowest
        chosen[name] = (best.learning_rate or 0.0, best.dialect)
    return chosen


def collect(output_dir: Path, test_rows: Sequence[Mapping], home_rows: Sequence[Mapping], seeds: int) -> None:
    """Write `comparison.csv`, a row for each job with a result, also of more than `seeds`, and `draws.npz`."""
    import pandas as pd

    while any(output_dir.glob(f"runs/*-seed{seeds}.json")):
        seeds += 1
    tuned = tuned_for()
    listed = [*tuning_jobs(tuned), *jobs(GROUPS, seeds, _chosen(output_dir, tuned))]
    groups: dict[str, set[str]] = {}
    for job in listed:
        groups.setdefault(job.name, set()).add(job.group)
    studies = {"test": truth(test_rows), "home": truth(home_rows)}
    rows: list[dict] = []
    draws: dict[str, np.ndarray] = {}
    for job in listed:
        found = read_result(output_dir, job)
        if found is None or "diverged" in found:
            continue
        if job.name not in draws:
            draws |= _draws(job, groups[job.name], unpacked(found["scores"]), studies)
        keys = ("method", "rank", "studies", "learning_rate", "dialect", "unseen", "seed", "chosen", "best_step")
        row = {"group": job.group, "name": job.name} | {key: found[key] for key in (*keys, "validation_auroc")}
        for where, measured in (("test", found), ("home", found.get("home", {}))):
            for metric in ("auroc", "calibration_error") if measured else ():
                ends = measured[metric]["mean"]
                row |= {f"{where}_{metric}{end}": ends[key] for end, key in _ENDS.items()}
        row |= {key: found[key] for key in ("trainable", "adapter_bytes", "seconds")}
        made = found["made_with"]
        row |= {"one_class": ", ".join(found["one_class"]), "steps": found["settings"].get("steps")}
        row |= {"device": made["device"], "medctkit": made["versions"]["medctkit"], "torch": made["versions"]["torch"]}
        rows.append(row | {name: found["auroc"][name]["value"] for name in FINDINGS})
    with replacing(output_dir / "draws.npz") as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **draws)  # type: ignore[arg-type]
    write_table(pd.DataFrame(rows), output_dir / "comparison.csv")


_ENDS = {"": "value", "_low": "low", "_high": "high"}


def _draws(
    job: Job,
    groups: set[str],
    scores: Mapping[str, np.ndarray],
    studies: Mapping[str, tuple[np.ndarray, np.ndarray]],
    resamples: int = 1000,
) -> dict[str, np.ndarray]:
    """AUROC of a run on the studies as they are and on each resample of their patients; see `results.Results`."""

    def drawn(what: str) -> np.ndarray:  # (1 + resamples, 18)
        labels, patients = studies["home" if what == "home" else "test"]
        weights = patient_weights(patients, resamples, seed=0)
        return metric_draws(labels, scores[what], np.full(len(FINDINGS), 0.5), weights)["auroc"]

    of = drawn("paper")
    found = {job.name: mean_of_findings(of)}
    if "home" in scores and groups & {"methods", "rivals"}:
        found[f"{job.name}/home"] = mean_of_findings(drawn("home"))
    if "unseen" in groups:
        held_out = np.isin(FINDINGS, HELD_OUT)
        for what in [name for name in scores if name != "home"]:
            each = of if what == "paper" else drawn(what)
            found[f"{job.name}/held out/{what}"] = mean_of_findings(each[:, held_out])
            found[f"{job.name}/seen/{what}"] = mean_of_findings(each[:, ~held_out])
    found = {name: values.astype(np.float32) for name, values in found.items()}
    if "rivals" in groups and job.method in (BASE, "lora", "hu-boxes"):
        found[f"{job.name}/findings"] = of.astype(np.float16)  # 18 times as many
    return found


def measure_costs(train: Dataset, settings: FineTuneConfig, repeats: int = 5) -> pd.DataFrame:
    """Seconds and memory of an optimiser step of each method, alone on the machine, one after the other.

    Returns:
        A row for each of `METHODS`: `seconds_per_step` (median), `peak_bytes` (of one step: weights, inputs,
        activations, gradients, optimiser), both also relative to full fine-tuning, batch size and device.
    """
    import pandas as pd

    mini, rows = load_mini_base(), []
    batch = collate(mini.tokenizer)([train[i] for i in range(settings.batch_size)])
    for name in METHODS:
        torch.manual_seed(0)
        seconds, peak = _cost(apply_method(load_mini_base().model, name), batch, mini.tokenizer, repeats)
        rows.append({"method": name, "seconds_per_step": seconds, "peak_bytes": peak})
    table = pd.DataFrame(rows)
    for column in ("seconds_per_step", "peak_bytes"):
        table[f"{column}_of_full"] = table[column] / table.loc[table["method"] == "full", column].item()
    return table.assign(batch_size=settings.batch_size, device=made_with(0)["device"])


def _cost(model: nn.Module, batch: Mapping[str, Any], tokenizer: Any, repeats: int) -> tuple[float, int]:
    """Median seconds, and peak bytes, of an optimiser step."""
    accelerator, config = accelerator_for(), FineTuneConfig(steps=1)
    model.to(accelerator.device).train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=config.learning_rate)
    prompts = draw_prompts(config.prompts, tokenizer, random.Random(0))

    def step() -> float:
        started = time.perf_counter()
        step_gradients(model, iter([batch]), 1, config, accelerator, prompts)
        accelerator.clip_grad_norm_(trainable, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    seconds = [step() for _ in range(2 + repeats)][2:]
    kept = [value for state in optimizer.state.values() for value in state.values()]
    inputs = [value for value in batch.values() if isinstance(value, torch.Tensor)]
    with PeakMemory(alive=[*model.state_dict().values(), *kept, *inputs]) as memory:
        step()
    return statistics.median(seconds), memory.peak_bytes
