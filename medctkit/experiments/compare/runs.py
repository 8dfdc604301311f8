"""The runs of the comparison: which there are, and how one is done; `run_all` does them all.

Every run starts from the mini base model and gets the same objectives, steps, batches, validations and seeds; methods
differ in what they train and in their learning rate, which validation studies choose from a small grid. Test studies
are scored once at the end of each run and choose nothing.
"""

from __future__ import annotations

import base64
import hashlib
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Subset

from medctkit.experiments.compare.data import Changed, Data, held_out, truth
from medctkit.experiments.compare.rivals import RIVALS
from medctkit.lora.counting import count_trainable
from medctkit.lora.methods import METHODS, apply_method, trained_bytes
from medctkit.metrics.scores import evaluate, mean_auroc
from medctkit.model.base_model import FOLDER as MINI_FOLDER
from medctkit.model.base_model import load_mini_base
from medctkit.training.loop import finetune
from medctkit.training.objectives import report_prompts
from medctkit.training.settings import FineTuneConfig
from medctkit.zero_shot.classifier import ZeroShotClassifier, validation_score
from medctkit.zero_shot.prompts import PROMPTS

GROUPS = ("learning-rates", "methods", "rivals", "unseen", "ranks", "studies")
RANKS = (1, 2, 4, 8, 16, 32, 64)
SIZES = (16, 32, 64, 128, 256, 512, None)  # None: all
DIALECTS = ("target", "source")  # whose sentences the per-finding loss speaks in
PLACEMENTS = ("lora", "lora-vision", "lora-text")  # whose dialect is chosen as their learning rate is
BASE, PROBE = "base", "linear-probe"
_UNSEEN = "-unseen"

# What all runs share; a run has its own learning rate and seed, and a smaller batch where there are fewer studies.
SETTINGS = FineTuneConfig(steps=100, batch_size=32)


@dataclass(frozen=True)
class Job:
    """One run. Jobs of two groups that have the same `name` are the same run, and are run once.

    Args:
        group: one of `GROUPS`, the question it helps to answer.
        method: one of `METHODS`, one of `RIVALS`, or "base".
        rank: of the adapter, where it has one.
        studies: number of training studies; None: all.
        learning_rate: None where nothing is trained by gradients.
        seed: of the run, and of which studies.
        dialect: one of `DIALECTS`.
        unseen: the findings of `HELD_OUT` are kept out of every loss, and so are the reports, which speak of them, and
            out of every choice on validation studies.
    """

    group: str
    method: str
    rank: int | None = None
    studies: int | None = None
    learning_rate: float | None = None
    seed: int = 0
    dialect: str = "target"
    unseen: bool = False

    @property
    def name(self) -> str:
        """What the run is, and the name of its file."""
        if self.method == BASE:
            return BASE
        rank = f"-r{self.rank}" if self.rank else ""
        rate = f"-lr{self.learning_rate:g}" if self.learning_rate else ""
        other = f"-{self.dialect}-wording" * (self.dialect != "target") + _UNSEEN * self.unseen
        return f"{self.method}{rank}-{self.studies or 'all'}-studies{rate}{other}-seed{self.seed}"

    @property
    def tuned(self) -> str:
        """Whose learning rate and dialect it has: a method's, or those of the method without the held-out findings."""
        return self.method + _UNSEEN * self.unseen


def tuning_jobs(tuned: Iterable[str]) -> list[Job]:
    """A run for each learning rate and dialect of each (`Job.tuned`), with seed 0 and all studies."""
    return [
        Job("learning-rates", name, METHODS[name].rank, None, rate, 0, dialect, each.endswith(_UNSEEN))
        for each in tuned
        for name in (each.removesuffix(_UNSEEN),)
        for dialect in (DIALECTS if name in PLACEMENTS else DIALECTS[:1])
        for rate in METHODS[name].learning_rates
    ]


def tuned_for(groups: Iterable[str] = GROUPS) -> list[str]:
    """What has to have its learning rate chosen for these groups (`Job.tuned`)."""
    groups = set(groups)
    needed = {"lora"}
    if {"methods", "learning-rates"} & groups:
        needed |= set(METHODS)
    if "rivals" in groups:
        needed |= {*PLACEMENTS, "full"}
    if "studies" in groups:
        needed |= {"full"}
    return [name for name in METHODS if name in needed] + ["lora" + _UNSEEN] * ("unseen" in groups)


def jobs(groups: Iterable[str], seeds: int, chosen: Mapping[str, tuple[float, str]]) -> list[Job]:
    """All runs of these groups; the base model is always among them.

    What has no learning rate and dialect in `chosen` (by `Job.tuned`) yet is not.
    """

    def tuned(group: str, method: str, rank: int | None, studies: int | None = None, unseen: bool = False) -> list[Job]:
        rate, dialect = chosen.get(method + _UNSEEN * unseen, (None, ""))
        return [Job(group, method, rank, studies, rate, seed, dialect, unseen) for seed in range(seeds) if rate]

    found = [Job("methods", BASE)]
    if "methods" in groups:
        found += [Job("methods", PROBE)]  # all studies and no chance: one seed says it all
        found += [job for name, method in METHODS.items() for job in tuned("methods", name, method.rank)]
    if "rivals" in groups:
        found += [Job("rivals", name) for name in (BASE, *RIVALS)]
        found += [job for name in (*PLACEMENTS, "full") for job in tuned("rivals", name, METHODS[name].rank)]
    if "unseen" in groups:
        found += [Job("unseen", BASE)]
        found += [
            job for unseen in (False, True) for job in tuned("unseen", "lora", METHODS["lora"].rank, None, unseen)
        ]
    if "ranks" in groups:
        found += [job for rank in RANKS for job in tuned("ranks", "lora", rank)]
    for studies in SIZES if "studies" in groups else ():
        for method in ("lora", "full"):
            found += tuned("studies", method, METHODS[method].rank, studies)
        found += [Job("studies", PROBE, studies=studies, seed=seed) for seed in range(seeds if studies else 1)]
    return found


# --- one run --------------------------------------------------------------------------------------------


def draw_studies(patients: Sequence[str], n: int | None, seed: int) -> list[int]:
    """Indices of `n` training studies: those of the first patients, in an order drawn by the seed, cut at n.

    For one seed the small sets lie within the large ones. Fewer studies than n are a ValueError.
    """
    if n is None:
        return list(range(len(patients)))
    if n > len(patients):
        raise ValueError(f"{n} training studies asked for, the manifest has {len(patients)}; leave that size out")
    names = np.unique(patients)
    place = {name: i for i, name in enumerate(np.random.default_rng(seed).permutation(names))}
    return sorted(range(len(patients)), key=lambda i: place[patients[i]])[:n]


def inputs_of(manifest_path: str | os.PathLike) -> dict[str, str]:
    """Digests of the base model and of the manifest."""
    paths = {"base": MINI_FOLDER / "model.safetensors", "manifest": Path(manifest_path)}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for name, path in paths.items()}


def settings_of(job: Job, settings: FineTuneConfig, inputs: Mapping[str, str]) -> dict[str, Any]:
    """All that a result depends on, beside the job and the versions; compared before a result is taken up."""
    if job.method == BASE or job.method in RIVALS:
        return dict(inputs)
    config = _config(job, settings)
    prompts = hashlib.sha256(repr(config.prompts).encode()).hexdigest()[:16]
    left_out = ("prompts", "workers", "checkpoint_every", "seed", "learning_rate", "epochs", "micro_batch_size")
    return {**inputs, "training prompts": prompts, **config.values(*left_out)}


def _config(job: Job, settings: FineTuneConfig) -> FineTuneConfig:
    """The settings of all runs with what is this run's own."""
    batch_size = min(settings.batch_size, job.studies or settings.batch_size)
    rate = job.learning_rate or settings.learning_rate
    own: dict[str, Any] = dict(batch_size=batch_size, learning_rate=rate, seed=job.seed)
    if job.unseen:
        own |= {"contrastive_weight": 0.0}
    return replace(settings, **own, prompts=report_prompts(job.dialect))


def run_job(job: Job, data: Data, settings: FineTuneConfig, work_dir: str | os.PathLike) -> dict[str, Any]:
    """Do one run and score it on the test studies; an interrupted one goes on from `work_dir`.

    Returns:
        `validation_auroc`; `auroc` and `calibration_error` (the mean over findings and each finding: value, low, high;
        bootstrap over test patients); `home`, the same of the test studies of the source hospital, for what asks
        prompts; `best_step`, `trainable`, `adapter_bytes`, `seconds`, `one_class`, `chosen` (by a rival); `scores`, for
        `unpacked`: of the test studies with each set of prompts, and at "home". If the learning rate was too high, only
        `diverged`, and why.
    """
    started = time.perf_counter()
    indices = draw_studies([row["patient"] for row in data.train.rows], job.studies, job.seed)
    found: dict[str, Any] = {"best_step": 0, "trainable": 0, "adapter_bytes": 0, "one_class": [], "chosen": ""}
    if job.method in RIVALS:
        rival = RIVALS[job.method].score(data, indices)
        found |= {"validation_auroc": mean_auroc(data.labels("valid"), rival.valid), "chosen": rival.chosen}
        found |= {"trainable": rival.trained, "adapter_bytes": 4 * rival.trained, "one_class": list(rival.one_class)}
        scores = {"paper": rival.test}
    else:
        model, tokenizer = data.mini.model, data.mini.tokenizer
        if job.method == BASE:
            found["validation_auroc"] = validation_score(data.valid, tokenizer)(model)
        else:
            torch.manual_seed(job.seed)
            model = apply_method(load_mini_base().model, job.method, **{"r": job.rank} if job.rank else {})
            train: Dataset = Subset(data.train, indices)
            valid: Dataset = data.valid
            if job.unseen:
                train, valid = Changed(train, held_out), Changed(valid, held_out)
            try:
                result = finetune(
                    model, train, tokenizer, _config(job, settings), work_dir, validation_score(valid, tokenizer)
                )
            except FloatingPointError as error:
                return {"diverged": str(error)}
            found |= {"best_step": result.best_step, "trainable": count_trainable(model), "seconds": result.seconds}
            found |= {"validation_auroc": result.best_score, "adapter_bytes": trained_bytes(result.adapter_dir)}
        asked = {name: ZeroShotClassifier(model, tokenizer, name) for name in PROMPTS}
        test, home = (asked["paper"].embed(dataset, progress=False).embeddings for dataset in (data.test, data.home))
        scores = {name: each.scores_from_embeddings(test) for name, each in asked.items()}
        scores["home"] = asked["paper"].scores_from_embeddings(home)
        found["home"] = _measured(data.home.rows, scores["home"])
    packed = {what: base64.b64encode(each.astype("<f4").tobytes()).decode() for what, each in scores.items()}
    seconds = {"seconds": time.perf_counter() - started}
    return seconds | found | {"scores": packed} | _measured(data.test.rows, scores["paper"])


def unpacked(scores: Mapping[str, str]) -> dict[str, np.ndarray]:
    """The `scores` of a run: (n, 18) each."""
    return {what: np.frombuffer(base64.b64decode(text), "<f4").reshape(-1, 18) for what, text in scores.items()}


def _measured(rows: Sequence[Mapping], scores: np.ndarray) -> dict[str, dict[str, dict[str, float | None]]]:
    """Both metrics of the mean over findings and of each: value, low, high; None where they cannot be computed."""
    labels, patients = truth(rows)
    table = evaluate(labels, scores, patients, resamples=1000).astype(object)
    table = table.where(table.notna(), None)
    return {
        name: table[[name, f"{name}_low", f"{name}_high"]].set_axis(["value", "low", "high"], axis=1).to_dict("index")
        for name in ("auroc", "calibration_error")
    }
