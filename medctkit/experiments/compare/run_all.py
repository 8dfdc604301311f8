"""Ways to fine-tune, side by side under equal conditions: what they score, and what they cost.

What a run is stands in `runs`. Here all of them are done, each with its result in a file of its own, so that an
interrupted comparison goes on where it was; seconds and memory are measured after them. `results` reads and shows them.
"""

import io
import json
import math
import os
import random
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from medctkit.cohort.dataset import CTReportDataset, collate, prepared_dir
from medctkit.cohort.manifest import load_manifest
from medctkit.common.atomic import alone, replacing
from medctkit.common.csv_tables import write_table
from medctkit.common.processes import accelerator_for, worker_pool
from medctkit.common.provenance import differences, made_with, write_json
from medctkit.experiments.adapt import Origin
from medctkit.experiments.compare.data import CAN_HOLD_OUT, HELD_OUT, HOME, PHANTOMS, Data, flipped, parts, truth
from medctkit.experiments.compare.runs import (
    BASE,
    GROUPS,
    SETTINGS,
    SWEEP,
    Job,
    inputs_of,
    jobs,
    run_job,
    settings_of,
    unpacked,
)
from medctkit.findings import FINDINGS
from medctkit.lora.methods import METHODS, apply_method
from medctkit.metrics.bootstrap import mean_of_findings, metric_draws, patient_weights
from medctkit.model.base_model import BaseModel
from medctkit.training.loop import step_gradients
from medctkit.training.memory import PeakMemory
from medctkit.training.objectives import draw_prompts
from medctkit.training.settings import FineTuneConfig

FIRST_SEEDS = 3  # of every group, before further seeds of any
# of a result: what `collect` keeps as it is, and how it calls the ends of an interval
_KEPT = "method rank studies learning_rate dialect variant seed chosen validation_auroc best_step trainable".split()
_KEPT += ["adapter_bytes", "seconds", "intruders"]
_ENDS = {"": "value", "_low": "low", "_high": "high"}

_data: Data | tuple  # of a worker process: where to load it from, then what was loaded


def _start_worker(threads: int, *where: Any) -> None:
    global _data
    torch.set_num_threads(threads)
    _data = where


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
    if before := read_result(output_dir, job):  # of the sweep, which trained it
        found["seconds"] += before["seconds"]
    result_file(output_dir, job).parent.mkdir(parents=True, exist_ok=True)
    write_json(run | found | {"made_with": made_with(job.seed)}, result_file(output_dir, job))
    if job.group != SWEEP:  # a sweep's best run is scored later
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
    if made_of is not None and (different := differences(there, made_of)):
        said = "; ".join(different)
        raise ValueError(f"{path} was made with other settings; choose another folder, or delete it. {said}")
    return found


class _Scores:
    """The validation score of each run, read once: None where it is not done yet, -inf where it diverged."""

    def __init__(self, output_dir: Path, made_of: Callable[[Job], dict] | None = None):
        self.output_dir, self.made_of = output_dir, made_of
        self._known: dict[str, float] = {}
        self._tested: set[str] = set()

    def __call__(self, job: Job) -> float | None:
        if job.name not in self._known:
            self._read(job)
        return self._known.get(job.name)

    def done(self, job: Job) -> bool:
        """Whether there is all that is wanted of it: of a sweep its validation score, of others the test scores too."""
        if job.group != SWEEP and job.name not in self._tested:
            self._read(job)
        return job.name in (self._known if job.group == SWEEP else self._tested) or self(job) == -math.inf

    def _read(self, job: Job) -> None:
        made_of = None if self.made_of is None else self.made_of(job)
        if found := read_result(self.output_dir, job, made_of):
            self._known[job.name] = -math.inf if "diverged" in found else found["validation_auroc"]
            self._tested |= {job.name} if "scores" in found else set()


def compare_methods(
    manifest_path: str | os.PathLike,
    output_dir: str | os.PathLike,
    groups: Sequence[str] = tuple(GROUPS),
    seeds: int = 5,
    settings: FineTuneConfig = SETTINGS,
    workers: int = 1,
    cache_dir: str | os.PathLike | None = None,
    origin: Origin = PHANTOMS,
    home: str = HOME,
) -> Path:
    """Do all runs that are not there yet, measure seconds and memory, and write the tables; returns `output_dir`.

    Runs are done in the order of `groups`, of each the sweeps of its learning rates first, then three seeds; further
    seeds follow when all groups have three. Stopped at any time, `--only` of the groups that are complete shows them.

    Args:
        manifest_path: usually `data_manifest.csv`.
        output_dir: gets `runs` (a file for each run), and what `results.load_results` reads.
        groups: some of `GROUPS`; learning rates that they need are chosen in any case.
        seeds: runs of each.
        settings: of all runs.
        workers: processes side by side, each with its share of the cores, and its own training volumes in memory.
        cache_dir: see `prepared_dir`.
        origin: base model, and the hospital that it is to go to.
        home: the hospital that it comes from.

    Raises:
        ValueError: unknown group; results of other settings in `output_dir`; no studies of a hospital; "unseen", whose
            findings are not in use.
        OSError: a worker process died.
    """
    if unknown := [group for group in groups if group not in GROUPS]:
        raise ValueError(f"unknown group {unknown[0]!r}; choose from {', '.join(GROUPS)}")
    if "unseen" in groups and not CAN_HOLD_OUT:
        raise ValueError(
            f"group unseen holds out {', '.join(HELD_OUT)}, of CT-RATE's list; choose other groups with --only"
        )
    if seeds < 1 or workers < 1:
        raise ValueError(f"seeds and workers must be at least 1, got {seeds} and {workers}")
    output_dir = Path(output_dir).expanduser()
    train, valid, test, at_home = parts(load_manifest(manifest_path), origin, home)
    cache_dir, base = prepared_dir(manifest_path, output_dir, cache_dir), origin.load()
    inputs = inputs_of(manifest_path, base, origin, home)
    made_of = partial(settings_of, settings=settings, inputs=inputs)
    score = _Scores(output_dir, made_of)
    stages = (range(min(FIRST_SEEDS, seeds)), range(FIRST_SEEDS, seeds))

    def wanted(assume: bool = False) -> dict[str, Job]:
        found: dict[str, Job] = {}
        for job in (job for some in stages for group in groups for job in jobs(group, some, score, assume)):
            if (job.studies or 0) < len(train) and (job.group != SWEEP or job.name not in found):
                found[job.name] = job
        return found

    expected = wanted(assume=True).values()
    left = [job for job in expected if not score.done(job)]
    untrained = [job for job in left if score(job) is None]
    print(f"{len(expected)} runs, {len(expected) - len(untrained)} of them there", flush=True)
    with alone(output_dir):
        if left:
            for rows in (train, valid, test, at_home):
                CTReportDataset(rows, base.preprocess_config, cache_dir).prepare()
            threads = max(1, (os.cpu_count() or 1) // workers)
            scored = len(test) + len(at_home)
            print(_what_it_costs(untrained, settings, origin, base, len(valid), scored, workers, threads), flush=True)
            running: dict[Future, str] = {}
            with (
                worker_pool(workers, _start_worker, threads, manifest_path, cache_dir, origin, home) as pool,
                tqdm(total=len(untrained), desc="comparing", unit="run") as bar,
            ):
                try:
                    while True:
                        busy = set(running.values())
                        waiting = [job for job in wanted().values() if job.name not in busy and not score.done(job)]
                        for job in waiting[: workers - len(running)]:
                            running[pool.submit(_work, job, settings, made_of(job), output_dir)] = job.name
                            bar.total += score(job) is not None  # a sweep's best, to be scored on test studies
                        if not running:
                            break
                        done, _ = wait(running, return_when=FIRST_COMPLETED)
                        for future in done:
                            future.result()  # the first that fails ends it
                            del running[future]
                            bar.update()
                except BrokenProcessPool:
                    raise OSError(
                        "a worker process died, most often for want of memory. Runs that were finished are kept: the "
                        "same command goes on from here, if need be with fewer --jobs"
                    ) from None
            for folder in (output_dir / "work").glob("*-seed*"):
                shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # there is something else in it
                (output_dir / "work").rmdir()
        if "methods" in groups and not (output_dir / "costs.csv").is_file():
            learnt_from = CTReportDataset(train, base.preprocess_config, cache_dir)
            write_table(measure_costs(learnt_from, settings, origin=origin), output_dir / "costs.csv")
        collect(output_dir, test.to_dict("records"), at_home.to_dict("records"), seeds)
    return output_dir


def _what_it_costs(
    left: Sequence[Job],
    settings: FineTuneConfig,
    origin: Origin,
    base: BaseModel,
    valid: int,
    scored: int,
    workers: int,
    threads: int,
) -> str:
    """How long runs will take, in words, from one step of LoRA and one batch embedded, measured here and now."""
    before, size = torch.get_num_threads(), settings.batch_size
    torch.set_num_threads(threads)
    try:
        model, tokenizer = apply_method(origin.load().model, "lora"), base.tokenizer
        pixels = torch.zeros(size, 1, *base.preprocess_config.shape)
        item = {"study": "", "patient": "", "report": "No finding. " * 20, "labels": torch.zeros(len(FINDINGS))}
        batch = collate(tokenizer)([item | {"pixel_values": volume} for volume in pixels])
        step, _ = _cost(model, batch, tokenizer, 1)
        started = time.perf_counter()
        with torch.no_grad():
            base.model.to(accelerator_for().device).encode_image(pixels.to(accelerator_for().device))
        embed = (time.perf_counter() - started) / size
    finally:
        torch.set_num_threads(before)
    steps = settings.steps_for(size)
    volumes = (1 - (-steps // settings.evaluate_every)) * valid + scored
    trained = [job for job in left if job.trains and job.method != "lora-text"]  # whose volumes are seen once for all
    passes = sum(min(1.0, (job.studies or size) / size) * steps * step + volumes * embed for job in trained)
    return (
        f"at least {passes / workers / 3600:.1f} h for {len(left)} runs, {workers} at a time: a step of {size} volumes "
        f"takes {step:.1f} s here; a sweep may want more rates"
    )


def collect(output_dir: Path, test_rows: Sequence[Mapping], home_rows: Sequence[Mapping], seeds: int) -> None:
    """Write what `load_results` reads, with a row for each job that has a result, and `tables.json`."""
    from medctkit.experiments.compare.results import DIVERGED, load_results
    from medctkit.experiments.compare.tables import write_tables

    while any(output_dir.glob(f"runs/*-seed{seeds}.json")):
        seeds += 1
    listed = [job for group in GROUPS for job in jobs(group, range(seeds), _Scores(output_dir))]
    listed = list({(job.group, job.name): job for job in listed}.values())
    groups: dict[str, set[str]] = {}
    for job in listed:
        groups.setdefault(job.name, set()).add(job.group)
    studies = {"test": truth(test_rows), "home": truth(home_rows)}
    rows: list[dict] = []
    diverged: list[dict] = []
    draws: dict[str, np.ndarray] = {}
    for job in listed:
        found = read_result(output_dir, job)
        if found is not None and job.group != SWEEP and "diverged" in found:
            diverged.append({"group": job.group, "name": job.name} | {key: found.get(key) for key in DIVERGED[2:]})
        if found is None or (job.group != SWEEP and "scores" not in found):  # not there, diverged, or not scored yet
            continue
        if job.group != SWEEP and job.name not in draws:
            draws |= _draws(job, groups[job.name], unpacked(found["scores"]), studies)
        row: dict[str, Any] = {"group": job.group, "name": job.name} | {key: found.get(key) for key in _KEPT}
        for where, measured in (("test", found), ("home", found.get("home", {}))):
            for metric in ("auroc", "calibration_error") if "auroc" in measured else ():
                ends = measured[metric]["mean"]
                row |= {f"{where}_{metric}{end}": ends[key] for end, key in _ENDS.items()}
        made, history = found["made_with"], json.dumps(found.get("history", []))
        row |= {
            "one_class": ", ".join(found.get("one_class", ())),
            "steps": found["settings"].get("steps"),
            "history": history,
        }
        row |= {"device": made["device"], "medctkit": made["versions"]["medctkit"], "torch": made["versions"]["torch"]}
        rows.append(row | {name: found["auroc"][name]["value"] for name in FINDINGS if "auroc" in found})
    with replacing(output_dir / "draws.npz") as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **draws)  # type: ignore[arg-type]
    write_table(pd.DataFrame(rows), output_dir / "comparison.csv")
    write_table(pd.DataFrame(diverged, columns=DIVERGED), output_dir / "diverged.csv")
    write_tables(load_results(output_dir), output_dir)


def _draws(
    job: Job,
    groups: set[str],
    scores: Mapping[str, np.ndarray],
    studies: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> dict[str, np.ndarray]:
    """AUROC of a run on the studies as they are and on each resample of their patients; see `results.Results`."""

    def drawn(what: str, noise: float = 0.0) -> dict[str, np.ndarray]:
        labels, patients = studies["home" if what.endswith("home") else "test"]
        if noise:
            items = ({"study": str(i), "labels": torch.from_numpy(each)} for i, each in enumerate(labels))
            labels = np.stack([flipped(item, noise, 0)["labels"].numpy() for item in items])  # the same for all runs
        weights = patient_weights(patients, 1000, seed=0)
        return metric_draws(labels, scores[what], np.full(len(FINDINGS), 0.5), weights)

    of = drawn("paper")["auroc"]
    found = {job.name: mean_of_findings(of)}
    for what in [name for name in scores if name.endswith("home") or name.startswith("strength")]:
        each = drawn(what)
        found[f"{job.name}/{what}"] = mean_of_findings(each["auroc"])
        if what == "home":
            found[f"{job.name}/home calibration"] = mean_of_findings(each["calibration_error"])
    if "noise" in groups and not job.variant:
        for percent in (5, 10, 20):
            found[f"{job.name}/flipped {percent}"] = mean_of_findings(drawn("paper", percent / 100)["auroc"])
    if "unseen" in groups:
        held_out = np.isin(FINDINGS, HELD_OUT)
        for what in [name for name in scores if "home" not in name and not name.startswith("strength")]:
            each_prompt = of if what == "paper" else drawn(what)["auroc"]
            found[f"{job.name}/held out/{what}"] = mean_of_findings(each_prompt[:, held_out])
            found[f"{job.name}/seen/{what}"] = mean_of_findings(each_prompt[:, ~held_out])
    found = {name: values.astype(np.float32) for name, values in found.items()}
    if "rivals" in groups and job.method in (BASE, "lora", "hu-boxes"):
        found[f"{job.name}/findings"] = of.astype(np.float16)  # 18 times as many
    return found


def measure_costs(
    train: Dataset, settings: FineTuneConfig, repeats: int = 5, origin: Origin = PHANTOMS
) -> pd.DataFrame:
    """Seconds and memory of an optimiser step of each method, alone on the machine, one after the other.

    Returns:
        A row for each of `METHODS`: `seconds_per_step` (median), `peak_bytes` (of one step: weights, inputs,
        activations, gradients, optimiser), both also relative to full fine-tuning, batch size and device.
    """
    tokenizer, rows = origin.load().tokenizer, []
    batch = collate(tokenizer)([train[i] for i in range(settings.batch_size)])
    for name in METHODS:
        torch.manual_seed(0)
        model = apply_method(origin.load().model, name)
        seconds, peak = _cost(model, batch, tokenizer, repeats)
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

    seconds = [step() for _ in range(1 + repeats)][1:]
    kept = [value for state in optimizer.state.values() for value in state.values()]
    inputs = [value for value in batch.values() if isinstance(value, torch.Tensor)]
    with PeakMemory(alive=[*model.state_dict().values(), *kept, *inputs]) as memory:
        step()
    return statistics.median(seconds), memory.peak_bytes
