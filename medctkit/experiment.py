"""The kit's default experiment: adapt the mini base model to the target hospital, and measure what that did.

Notebooks 03 and 04 walk through the same steps one by one; here they are in one call each, for the command
line, for several seeds, and for the checks of the shipped base model.
"""

import json
import os
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from medctkit.atomic import replacing
from medctkit.dataset import CTReportDataset
from medctkit.lora import add_lora, load_adapter
from medctkit.manifest import load_manifest
from medctkit.metrics import compare, evaluate, summary, thresholds_from_validation
from medctkit.mini import load_mini_base
from medctkit.training import FineTuneConfig, FineTuneResult, finetune
from medctkit.zero_shot import ZeroShotClassifier, validation_score

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Adaptation:
    """Settings of the default adaptation; chosen on validation patients of the target hospital.

    Args:
        preset: LoRA placement, see `medctkit.lora.PRESETS`.
        rank: of the adapter.
        steps: optimiser steps.
        batch_size: volumes per step.
        learning_rate: its peak.
    """

    preset: str = "paper"
    rank: int = 16
    steps: int = 200
    batch_size: int = 32
    learning_rate: float = 3e-3

    def config(self, seed: int) -> FineTuneConfig:
        """The settings as `finetune` takes them."""
        return FineTuneConfig(steps=self.steps, batch_size=self.batch_size, learning_rate=self.learning_rate, seed=seed)


DEFAULT = Adaptation()


def cohort(manifest: "pd.DataFrame", hospital: str, split: str, preprocess_config, cache_dir) -> CTReportDataset:
    """The prepared studies of one hospital and split, in memory."""
    rows = manifest[(manifest["hospital"] == hospital) & (manifest["split"] == split)]
    dataset = CTReportDataset(rows, preprocess_config, cache_dir)
    dataset.prepare()
    return dataset.in_memory()


def adapt(manifest_path, output_dir, seed: int = 0, settings: Adaptation = DEFAULT, cache_dir=None) -> FineTuneResult:
    """Adapt the mini base model to the target hospital's training studies.

    Validation studies choose the best step; test studies are not read.

    Args:
        manifest_path: usually `data_manifest.csv`.
        output_dir: the adapter goes into its `adapter` folder, the history into `history.csv`.
        seed: of the adapter's start, batches and wordings.
        settings: of the adaptation.
        cache_dir: prepared volumes; `output_dir/prepared` by default.
    """
    output_dir = Path(output_dir)
    cache_dir = output_dir / "prepared" if cache_dir is None else cache_dir
    mini, manifest = load_mini_base(), load_manifest(manifest_path)
    train, valid = (
        cohort(manifest, "target", split, mini.preprocess_config, cache_dir) for split in ("train", "valid")
    )
    torch.manual_seed(seed)
    model = add_lora(mini.model, settings.preset, r=settings.rank)
    score = validation_score(valid, mini.tokenizer)
    result = finetune(model, train, mini.tokenizer, settings.config(seed), output_dir, score)
    result.history.to_csv(output_dir / "history.csv", index=False)
    return result


def measure(manifest_path, output_dir, seed: int = 0, cache_dir=None) -> dict:
    """Score base and adapted model on the target hospital's test patients; write `metrics.json`.

    Thresholds come from validation patients, intervals from a bootstrap over test patients.

    Args:
        manifest_path: usually `data_manifest.csv`.
        output_dir: where `adapt` wrote.
        seed: of the bootstrap.
        cache_dir: prepared volumes; `output_dir/prepared` by default.

    Returns:
        What is in metrics.json: see `medctkit.metrics.summary`, and `made_with`.

    Raises:
        FileNotFoundError: no adapter in `output_dir`.
    """
    output_dir = Path(output_dir)
    cache_dir = output_dir / "prepared" if cache_dir is None else cache_dir
    mini, manifest = load_mini_base(), load_manifest(manifest_path)
    adapted = load_adapter(load_mini_base().model, output_dir / "adapter")
    data = {s: cohort(manifest, "target", s, mini.preprocess_config, cache_dir) for s in ("valid", "test")}
    tables, scores, limits = {}, {}, {}
    for name, model in {"base": mini.model, "adapted": adapted}.items():
        classifier = ZeroShotClassifier(model, mini.tokenizer)
        seen = {split: classifier.embed(dataset) for split, dataset in data.items()}
        found = {split: classifier.scores_from_embeddings(e.embeddings) for split, e in seen.items()}
        limits[name] = thresholds_from_validation(seen["valid"].labels, found["valid"])
        scores[name], test = found["test"], seen["test"]
        tables[name] = evaluate(test.labels, scores[name], test.patients, limits[name], seed=seed)
    difference = compare(
        test.labels, scores["base"], scores["adapted"], test.patients, limits["base"], limits["adapted"], seed=seed
    )
    result = summary(tables["base"], tables["adapted"], difference) | {"made_with": made_with(seed)}
    write_json(result, output_dir / "metrics.json")
    return result


def source_auroc(manifest_path, cache_dir, seed: int = 0) -> "pd.DataFrame":
    """The base model on its own hospital's test patients; see `medctkit.metrics.evaluate`."""
    mini = load_mini_base()
    dataset = cohort(load_manifest(manifest_path), "source", "test", mini.preprocess_config, cache_dir)
    classifier = ZeroShotClassifier(mini.model, mini.tokenizer)
    seen = classifier.embed(dataset)
    return evaluate(seen.labels, classifier.scores_from_embeddings(seen.embeddings), seen.patients, seed=seed)


def made_with(seed: int) -> dict:
    """Seed, device and versions: what a number needs beside it."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    versions = {name: version(name) for name in ("medctkit", "torch", "transformers", "peft", "numpy")}
    return {"seed": seed, "device": device, "versions": versions, "data": "phantom"}


def write_json(content: dict, path: str | os.PathLike) -> None:
    """Write JSON, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
