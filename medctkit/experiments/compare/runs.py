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
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset

from medctkit.cohort.dataset import CTReportDataset
from medctkit.cohort.manifest import load_manifest
from medctkit.findings import FINDINGS
from medctkit.lora.counting import count_trainable
from medctkit.lora.methods import METHODS, apply_method, trained_bytes
from medctkit.metrics import scores as metrics
from medctkit.model.base_model import FOLDER as MINI_FOLDER
from medctkit.model.base_model import BaseModel, load_mini_base
from medctkit.training.loop import finetune
from medctkit.training.settings import FineTuneConfig
from medctkit.zero_shot.classifier import Embedded, ZeroShotClassifier, validation_score

GROUPS = ("learning-rates", "methods", "ranks", "studies")
RANKS = (1, 2, 4, 8, 16, 32, 64)
SIZES = (16, 32, 64, 128, 256, 512, None)  # None: all
TUNED_AS = {"lora-vision": "lora", "lora-text": "lora", "dora": "lora"}  # these take LoRA's learning rate
BASE, PROBE = "base", "linear-probe"
PROBE_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  # scikit-learn's C


# What all runs share; a run has its own learning rate and seed, and a smaller batch where there are fewer studies.
SETTINGS = FineTuneConfig(steps=100, batch_size=32)


@dataclass(frozen=True)
class Job:
    """One run. Jobs of two groups that have the same `name` are the same run, and are run once.

    Args:
        group: one of `GROUPS`, the question it helps to answer.
        method: one of `METHODS`, "base" or "linear-probe".
        rank: of the adapter, where it has one.
        studies: number of training studies; None: all.
        learning_rate: None where nothing is trained by gradients.
        seed: of the run, and of which studies.
    """

    group: str
    method: str
    rank: int | None = None
    studies: int | None = None
    learning_rate: float | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        """What the run is, and the name of its file."""
        if self.method == BASE:
            return BASE
        rank = f"-r{self.rank}" if self.rank else ""
        rate = f"-lr{self.learning_rate:g}" if self.learning_rate else ""
        return f"{self.method}{rank}-{self.studies or 'all'}-studies{rate}-seed{self.seed}"


def tuning_jobs(methods: Iterable[str]) -> list[Job]:
    """A run for each learning rate of each method that has a grid of its own, with seed 0 and all studies."""
    own = {name: METHODS[name] for name in (TUNED_AS.get(method, method) for method in methods)}
    return [Job("learning-rates", n, m.rank, learning_rate=rate) for n, m in own.items() for rate in m.learning_rates]


def methods_of(groups: Iterable[str]) -> list[str]:
    """The methods whose learning rate has to be known for these groups."""
    wide = {"methods", "learning-rates"} & set(groups)
    return list(METHODS) if wide else ["lora", "full"] if "studies" in groups else ["lora"]


def jobs(groups: Iterable[str], seeds: int, rates: Mapping[str, float]) -> list[Job]:
    """All runs of these groups; the base model is always among them, a method whose rate is not chosen yet is not."""

    def tuned(group: str, method: str, rank: int | None, studies: int | None = None) -> list[Job]:
        rate = rates.get(TUNED_AS.get(method, method))
        return [Job(group, method, rank, studies, rate, seed) for seed in range(seeds) if rate]

    found = [Job("methods", BASE)]
    if "methods" in groups:
        found += [Job("methods", PROBE)]  # all studies and no chance: one seed says it all
        found += [job for name, method in METHODS.items() for job in tuned("methods", name, method.rank)]
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
    """The target hospital's studies, and the base model."""

    train: CTReportDataset
    valid: CTReportDataset
    test: CTReportDataset
    mini: BaseModel

    @classmethod
    def load(cls, manifest_path: str | os.PathLike, cache_dir: str | os.PathLike) -> Data:
        """From a manifest and a folder of prepared volumes, which are made where missing."""
        mini, table = load_mini_base(), load_manifest(manifest_path)
        table = table[table["hospital"] == "target"]
        splits = (table[table["split"] == split] for split in ("train", "valid", "test"))
        read = [CTReportDataset(rows, mini.preprocess_config, cache_dir).in_memory() for rows in splits]
        return cls(read[0], read[1], read[2], mini)

    @cache  # noqa: B019 (one object, as long as the process)
    def embedded(self, split: str) -> Embedded:
        """A split through the base model, once."""
        return ZeroShotClassifier(self.mini.model, self.mini.tokenizer).embed(getattr(self, split), progress=False)


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


@dataclass(frozen=True)
class Probe:
    """A linear probe: 18 logistic regressions on frozen embeddings.

    `scores` (n, 18) are probabilities of the test studies, 0.5 throughout for the findings in `one_class`, of which the
    training studies hold one class only. `strength` is scikit-learn's C, chosen by `validation_auroc`.
    """

    scores: np.ndarray
    strength: float
    validation_auroc: float
    one_class: tuple[str, ...]


def linear_probe(
    train: Embedded, valid: Embedded, test: Embedded, strengths: Sequence[float] = PROBE_STRENGTHS
) -> Probe:
    """Fit a logistic regression for each finding on the base model's image embeddings, standardised.

    A probe is not zero-shot: it answers 18 questions and no other. `valid` chooses C, one for all findings, from
    `strengths`, lowest first. The embedding is the better feature on the default cohort: mean validation AUROC 0.675,
    against 0.623 of the quantised tokens averaged over all places.

    Raises:
        ValueError: no finding has both classes in `valid`.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(train.embeddings)
    x, *seen = (scaler.transform(split.embeddings) for split in (train, valid, test))
    both = [k for k in range(len(FINDINGS)) if 0 < train.labels[:, k].mean() < 1]
    judged = [k for k in range(len(FINDINGS)) if 0 < valid.labels[:, k].mean() < 1]
    if not judged:
        raise ValueError("no finding has both positive and negative studies in the validation data")
    one_class = tuple(name for k, name in enumerate(FINDINGS) if k not in both)
    probes = []
    for strength in strengths:
        scores = [np.full((len(split), len(FINDINGS)), 0.5) for split in seen]
        for k in both:
            model = LogisticRegression(C=strength, max_iter=2000).fit(x, train.labels[:, k])
            for split, out in zip(seen, scores, strict=True):
                out[:, k] = model.predict_proba(split)[:, 1]
        auroc = float(np.mean([roc_auc_score(valid.labels[:, k], scores[0][:, k]) for k in judged]))
        probes.append(Probe(scores[1], strength, auroc, one_class))
    return max(probes, key=lambda probe: probe.validation_auroc)  # of equals, the lowest C


def inputs_of(manifest_path: str | os.PathLike) -> dict[str, str]:
    """Digests of the base model and of the manifest."""
    paths = {"base": MINI_FOLDER / "model.safetensors", "manifest": Path(manifest_path)}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for name, path in paths.items()}


def settings_of(job: Job, settings: FineTuneConfig, inputs: Mapping[str, str]) -> dict[str, Any]:
    """All that a result depends on, beside the job and the versions; compared before a result is taken up."""
    if job.method == BASE:
        return dict(inputs)
    if job.method == PROBE:
        return {**inputs, "strengths": list(PROBE_STRENGTHS)}
    config = _config(job, settings)
    prompts = hashlib.sha256(repr(config.prompts).encode()).hexdigest()[:16]
    left_out = ("prompts", "workers", "checkpoint_every", "seed", "learning_rate", "epochs", "micro_batch_size")
    return {**inputs, "training prompts": prompts, **config.values(*left_out)}


def _config(job: Job, settings: FineTuneConfig) -> FineTuneConfig:
    """The settings of all runs with what is this run's own."""
    batch_size = min(settings.batch_size, job.studies or settings.batch_size)
    rate = job.learning_rate or settings.learning_rate
    return replace(settings, batch_size=batch_size, learning_rate=rate, seed=job.seed)


def run_job(job: Job, data: Data, settings: FineTuneConfig, work_dir: str | os.PathLike) -> dict[str, Any]:
    """Do one run and score it on the test studies; an interrupted one goes on from `work_dir`.

    Returns:
        `validation_auroc`, `auroc` (the mean over findings and each finding: value, low, high; bootstrap over test
        patients), `best_step`, `trainable`, `adapter_bytes`, `seconds`, `one_class`, `scores` of the test studies; or
        only `diverged`, and why, if the learning rate was too high.
    """
    started = time.perf_counter()
    indices = draw_studies([row["patient"] for row in data.train.rows], job.studies, job.seed)
    found: dict[str, Any] = {"best_step": 0, "trainable": 0, "adapter_bytes": 0, "one_class": []}
    if job.method == PROBE:
        seen = data.embedded("train")
        drawn = (part[indices] for part in (seen.embeddings, seen.labels, seen.patients, seen.studies))
        train = Embedded(*drawn)  # type: ignore[arg-type]
        probe = linear_probe(train, data.embedded("valid"), data.embedded("test"))
        scores, validation = probe.scores, probe.validation_auroc
        trainable = (len(FINDINGS) - len(probe.one_class)) * (train.embeddings.shape[1] + 1)
        found |= {"trainable": trainable, "adapter_bytes": 4 * trainable, "one_class": list(probe.one_class)}
        found |= {"strength": probe.strength}
    elif job.method == BASE:
        validation = validation_score(data.valid, data.mini.tokenizer)(data.mini.model)
        classifier = ZeroShotClassifier(data.mini.model, data.mini.tokenizer)
        scores = classifier.scores_from_embeddings(data.embedded("test").embeddings)
    else:
        torch.manual_seed(job.seed)
        model = apply_method(load_mini_base().model, job.method, **{"r": job.rank} if job.rank else {})
        score, config = validation_score(data.valid, data.mini.tokenizer), _config(job, settings)
        try:
            result = finetune(model, Subset(data.train, indices), data.mini.tokenizer, config, work_dir, score)
        except FloatingPointError as error:
            return {"diverged": str(error)}
        found |= {"best_step": result.best_step, "trainable": count_trainable(model), "seconds": result.seconds}
        found |= {"adapter_bytes": trained_bytes(result.adapter_dir)}
        classifier, validation = ZeroShotClassifier(model, data.mini.tokenizer), result.best_score
        scores = classifier.scores_from_embeddings(classifier.embed(data.test, progress=False).embeddings)
    found = {"seconds": time.perf_counter() - started} | found
    labels, patients = truth(data.test.rows)
    table = metrics.evaluate(labels, scores, patients)
    ends = {"value": "auroc", "low": "auroc_low", "high": "auroc_high"}
    auroc = {
        name: {end: None if np.isnan(table.loc[name, c]) else float(table.loc[name, c]) for end, c in ends.items()}
        for name in ("mean", *FINDINGS)
    }
    packed = base64.b64encode(np.asarray(scores, dtype="<f4").tobytes()).decode()
    return found | {"validation_auroc": validation, "auroc": auroc, "scores": packed}


def truth(rows: Sequence[Mapping]) -> tuple[np.ndarray, np.ndarray]:
    """Labels (n, 18) and patients (n,) of rows of a manifest."""
    return np.array([[float(row[f]) for f in FINDINGS] for row in rows]), np.array([row["patient"] for row in rows])
