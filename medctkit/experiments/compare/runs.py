"""The runs of the comparison: which there are, and how one is done; `comparison` does them all.

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
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset, Subset

from medctkit.cohort.dataset import CTReportDataset
from medctkit.cohort.manifest import load_manifest
from medctkit.experiments.compare.rivals import RIVALS, batches, body_quantiles, lung_centroid
from medctkit.findings import FINDINGS
from medctkit.lora.counting import count_trainable
from medctkit.lora.methods import METHODS, apply_method, trained_bytes
from medctkit.metrics import scores as metrics
from medctkit.model.base_model import FOLDER as MINI_FOLDER
from medctkit.model.base_model import BaseModel, load_mini_base
from medctkit.training.loop import finetune
from medctkit.training.objectives import report_prompts
from medctkit.training.settings import FineTuneConfig
from medctkit.zero_shot.classifier import Embedded, ZeroShotClassifier, validation_score
from medctkit.zero_shot.prompts import PROMPTS

if TYPE_CHECKING:
    import pandas as pd

GROUPS = ("learning-rates", "methods", "rivals", "unseen", "ranks", "studies")
RANKS = (1, 2, 4, 8, 16, 32, 64)
SIZES = (16, 32, 64, 128, 256, 512, None)  # None: all
DIALECTS = ("target", "source")  # whose sentences the per-finding loss speaks in
PLACEMENTS = ("lora", "lora-vision", "lora-text")  # whose dialect is chosen as their learning rate is
BASE, PROBE = "base", "linear-probe"
# Kept out of every loss in the runs of "unseen": one of each group that has several findings or none like it.
HELD_OUT = ("Pleural effusion", "Emphysema", "Hiatal hernia", "Bronchiectasis")


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
        unseen: the findings of `HELD_OUT` are kept out of every loss, and so are the reports, which speak of them.
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
        other = f"-{self.dialect}-wording" * (self.dialect != "target") + "-unseen" * self.unseen
        return f"{self.method}{rank}-{self.studies or 'all'}-studies{rate}{other}-seed{self.seed}"


def tuning_jobs(methods: Iterable[str]) -> list[Job]:
    """A run for each learning rate and dialect of each method, with seed 0 and all studies."""
    return [
        Job("learning-rates", name, METHODS[name].rank, learning_rate=rate, dialect=dialect)
        for name in methods
        for dialect in (DIALECTS if name in PLACEMENTS else DIALECTS[:1])
        for rate in METHODS[name].learning_rates
    ]


def methods_of(groups: Iterable[str]) -> list[str]:
    """The methods whose learning rate has to be known for these groups."""
    groups = set(groups)
    if {"methods", "learning-rates"} & groups:
        return list(METHODS)
    needed = {"lora"}
    if "rivals" in groups:
        needed |= {*PLACEMENTS, "full"}
    if "studies" in groups:
        needed |= {"full"}
    return [name for name in METHODS if name in needed]


def jobs(groups: Iterable[str], seeds: int, chosen: Mapping[str, tuple[float, str]]) -> list[Job]:
    """All runs of these groups; the base model is always among them.

    A method whose rate and dialect are not `chosen` yet is not.
    """

    def tuned(group: str, method: str, rank: int | None, studies: int | None = None, **more: Any) -> list[Job]:
        rate, dialect = chosen.get(method, (None, ""))
        return [Job(group, method, rank, studies, rate, seed, dialect, **more) for seed in range(seeds) if rate]

    found = [Job("methods", BASE)]
    if "methods" in groups:
        found += [Job("methods", PROBE)]  # all studies and no chance: one seed says it all
        found += [job for name, method in METHODS.items() for job in tuned("methods", name, method.rank)]
    if "rivals" in groups:
        found += [Job("rivals", name) for name in RIVALS]
        found += [job for name in (*PLACEMENTS, "full") for job in tuned("rivals", name, METHODS[name].rank)]
    if "unseen" in groups:
        found += tuned("unseen", "lora", METHODS["lora"].rank, unseen=True)
    if "ranks" in groups:
        found += [job for rank in RANKS for job in tuned("ranks", "lora", rank)]
    for studies in SIZES if "studies" in groups else ():
        for method in ("lora", "full"):
            found += tuned("studies", method, METHODS[method].rank, studies)
        found += [Job("studies", PROBE, studies=studies, seed=seed) for seed in range(seeds if studies else 1)]
    return found


# --- one run --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Data:
    """The target hospital's studies, test studies of the source hospital (`home`), and the base model."""

    train: CTReportDataset
    valid: CTReportDataset
    test: CTReportDataset
    home: CTReportDataset
    mini: BaseModel

    @classmethod
    def load(cls, manifest_path: str | os.PathLike, cache_dir: str | os.PathLike) -> Data:
        """From a manifest and a folder of prepared volumes, which are made where missing."""
        mini, table = load_mini_base(), load_manifest(manifest_path)
        train, valid, test, home = (
            CTReportDataset(rows, mini.preprocess_config, cache_dir).in_memory() for rows in parts(table)
        )
        return cls(train, valid, test, home, mini)

    @cache  # noqa: B019 (one object, as long as the process)
    def embedded(self, split: str) -> Embedded:
        """A split through the base model, once."""
        return ZeroShotClassifier(self.mini.model, self.mini.tokenizer).embed(getattr(self, split), progress=False)

    @cached_property
    def centre(self) -> torch.Tensor:
        """Mean centre (3,) of the lungs at home, in voxels."""
        return torch.cat([lung_centroid(volumes) for volumes in batches(self.home)]).mean(0)

    @cached_property
    def quantiles(self) -> np.ndarray:
        """Mean quantiles of HU within the body at home."""
        return np.mean([body_quantiles(volumes) for volumes in batches(self.home, 1)], axis=0)


def parts(table: pd.DataFrame) -> list[pd.DataFrame]:
    """The rows of a manifest that a comparison reads: target train, valid and test, and source test."""
    wanted = (("target", "train"), ("target", "valid"), ("target", "test"), ("source", "test"))
    return [table[(table["hospital"] == hospital) & (table["split"] == split)] for hospital, split in wanted]


class HeldOut(Dataset):
    """Studies of which some labels are unknown."""

    def __init__(self, dataset: Dataset, findings: Sequence[str] = HELD_OUT):
        self.dataset, self.unknown = dataset, [FINDINGS.index(name) for name in findings]

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.dataset[index]
        labels = item["labels"].clone()
        labels[self.unknown] = float("nan")
        return item | {"labels": labels}


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
        `validation_auroc`, `auroc` (the mean over findings and each finding: value, low, high; bootstrap over test
        patients), `home` (the same at the source hospital, and `ece`, its calibration; of what asks prompts),
        `by_prompts` (mean AUROC with each set of prompts), `best_step`, `trainable`, `adapter_bytes`, `seconds`,
        `one_class`, `scores` of the test studies; or only `diverged`, and why, if the learning rate was too high.
    """
    started = time.perf_counter()
    indices = draw_studies([row["patient"] for row in data.train.rows], job.studies, job.seed)
    found: dict[str, Any] = {"best_step": 0, "trainable": 0, "adapter_bytes": 0, "one_class": []}
    if job.method in RIVALS:
        scored = RIVALS[job.method].score(data, indices)
        validation, scores = mean_auroc(truth(data.valid.rows)[0], scored.valid), scored.test
        found |= {"trainable": scored.trained, "adapter_bytes": 4 * scored.trained, "one_class": list(scored.one_class)}
    else:
        model = data.mini.model
        if job.method == BASE:
            seen = [data.embedded(split) for split in ("test", "home")]
            validation = validation_score(data.valid, data.mini.tokenizer)(model)
        else:
            torch.manual_seed(job.seed)
            model = apply_method(load_mini_base().model, job.method, **{"r": job.rank} if job.rank else {})
            train: Dataset = Subset(data.train, indices)
            valid: Dataset = data.valid
            if job.unseen:
                train, valid = HeldOut(train), HeldOut(valid)
            score, config = validation_score(valid, data.mini.tokenizer), _config(job, settings)
            try:
                result = finetune(model, train, data.mini.tokenizer, config, work_dir, score)
            except FloatingPointError as error:
                return {"diverged": str(error)}
            validation = result.best_score
            found |= {"best_step": result.best_step, "trainable": count_trainable(model), "seconds": result.seconds}
            found |= {"adapter_bytes": trained_bytes(result.adapter_dir)}
            classifier = ZeroShotClassifier(model, data.mini.tokenizer)
            seen = [classifier.embed(dataset, progress=False) for dataset in (data.test, data.home)]
        asked = {name: ZeroShotClassifier(model, data.mini.tokenizer, name) for name in PROMPTS}
        scores, at_home = (asked["paper"].scores_from_embeddings(each.embeddings) for each in seen)
        found |= {"home": _measured(data.home, at_home, ("auroc", "ece"))}
        found["by_prompts"] = {
            name: mean_auroc(seen[0].labels, each.scores_from_embeddings(seen[0].embeddings))
            for name, each in asked.items()
        }
    found = {"seconds": time.perf_counter() - started} | found
    packed = base64.b64encode(np.asarray(scores, dtype="<f4").tobytes()).decode()
    return found | {"validation_auroc": validation, "scores": packed} | _measured(data.test, scores, ("auroc",))


def _measured(dataset: CTReportDataset, scores: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Metrics of the mean over findings and of each: value, low, high; None where they cannot be computed."""
    table = metrics.evaluate(*(truth(dataset.rows)[0], scores, truth(dataset.rows)[1]))
    found = table.astype(object).where(table.notna(), None)
    return {
        name: {
            row: {
                "value": found.loc[row, name],
                "low": found.loc[row, f"{name}_low"],
                "high": found.loc[row, f"{name}_high"],
            }
            for row in ("mean", *FINDINGS)
        }
        for name in names
    }


def mean_auroc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Mean AUROC over the findings that have both classes in labels (n, 18)."""
    from sklearn.metrics import roc_auc_score

    judged = [k for k in range(labels.shape[1]) if 0 < labels[:, k].mean() < 1]
    return float(np.mean([roc_auc_score(labels[:, k], scores[:, k]) for k in judged]))


def truth(rows: Sequence[Mapping]) -> tuple[np.ndarray, np.ndarray]:
    """Labels (n, 18) and patients (n,) of rows of a manifest."""
    return np.array([[float(row[f]) for f in FINDINGS] for row in rows]), np.array([row["patient"] for row in rows])
