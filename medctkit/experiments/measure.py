"""Base and adapted model on the test studies of a hospital: everything that the reproduction report shows.

Each volume is embedded once for each model; other prompts, retrieval and most of the audit come from the embeddings.
"""

import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd

from medctkit.cohort import ct_rate as ctrate
from medctkit.cohort.dataset import CTReportDataset, load_split, prepared_dir
from medctkit.cohort.manifest import has_file, load_manifest, volume_from_row
from medctkit.cohort.patients import characteristics
from medctkit.common.processes import accelerator_for
from medctkit.common.provenance import made_with, write_json
from medctkit.experiments.adapt import Origin
from medctkit.experiments.audit import Answers, Defect, audit, audit_scans, prompt_mismatch
from medctkit.experiments.clinical import Clinical, clinical_statistics
from medctkit.findings import FACTS
from medctkit.lora.methods import load_trained, trained_bytes, trained_count
from medctkit.metrics.bootstrap import RESAMPLES, with_interval
from medctkit.metrics.scores import HOME_ROWS, evaluate_both, mean_draws, summary, thresholds_from_validation
from medctkit.model.protocol import Model
from medctkit.training.checkpoints import described, finished_run
from medctkit.zero_shot.classifier import Embedded, ZeroShotClassifier
from medctkit.zero_shot.embeddings import Changed, refuse_other_order, same_studies
from medctkit.zero_shot.prompts import PROMPTS
from medctkit.zero_shot.retrieval import embed_reports, report_to_volume, volume_to_volume


@dataclass(frozen=True)
class Home:
    """What adaptation cost in the hospital that the base model comes from: `tables`, `difference` as in Measurement.

    No threshold is chosen there, so only AUROC, average precision and calibration say anything.
    """

    hospital: str
    tables: dict[str, pd.DataFrame]
    difference: pd.DataFrame

    @property
    def summary(self) -> dict:
        """What is in metrics.json under "home"; also the AUROC of each finding that has one."""

        def of(row: str, names: Iterable[str]) -> dict:
            return summary(self.tables["base"], self.tables["adapted"], self.difference, names, row)

        scored = self.difference["auroc"].drop(index="mean").dropna().index
        counts = {"hospital": self.hospital, "studies": int(self.difference.loc["mean", "studies"])}
        return counts | of("mean", HOME_ROWS) | {"findings": {name: of(name, ["auroc"]) for name in scored}}


@dataclass(frozen=True)
class Measurement:
    """What the reproduction report is made from.

    Attributes:
        labels: (n, 18) of the test studies.
        patients: (n,) names.
        studies: (n,) names.
        scores: (n, 18) probabilities for "base" and "adapted".
        tables: see `medctkit.metrics.scores.evaluate`, for both; thresholds are from validation studies.
        difference: see `medctkit.metrics.scores.compare`, adapted minus base.
        prompts: mean AUROC of both models with every set of prompts.
        retrieval: see `zero_shot.retrieval`; empty where there are fewer than 20 studies, or one without a report.
        adapter: `vision` and `text`, adapted layers in each encoder; `trainable` and `bytes` of the adapter;
            `base_parameters`.
        defects: what the public evaluation would have made of the base model here.
        origin: base model and hospital.
        made_with: see `made_with`, and the command; `findings` that are your own.
        supervised: whether the adapted model learnt from labels, by the per-finding loss; else from reports alone.
        home: both models where the base model comes from; None where the manifest has no such test studies.
        clinical: see `Clinical`.
    """

    labels: np.ndarray
    patients: np.ndarray
    studies: np.ndarray
    scores: dict[str, np.ndarray]
    tables: dict[str, pd.DataFrame]
    difference: pd.DataFrame
    prompts: pd.DataFrame
    retrieval: pd.DataFrame
    adapter: dict[str, int]
    defects: list[Defect]
    origin: Origin
    made_with: dict
    supervised: bool = True
    home: Home | None = None
    clinical: Clinical | None = None

    @property
    def summary(self) -> dict:
        """What is in metrics.json."""
        means = summary(self.tables["base"], self.tables["adapted"], self.difference)
        more = {"home": self.home, "clinical": self.clinical}
        return means | {"made_with": self.made_with} | {name: part.summary for name, part in more.items() if part}


def measure(
    manifest_path: str | os.PathLike,
    output_dir: str | os.PathLike,
    seed: int = 0,
    cache_dir: str | os.PathLike | None = None,
    batch_size: int = 32,
    audit_volumes: int | None = None,
    home: str | None = None,
    resamples: int = RESAMPLES,
    known: Mapping[tuple[str, str], Embedded] = MappingProxyType({}),
) -> Measurement:
    """Score base and adapted model on the hospital's test patients, and on those of the base's; write `metrics.json`.

    Thresholds come from validation patients, intervals from a bootstrap over test patients.

    Args:
        manifest_path: usually `data_manifest.csv`.
        output_dir: where `adapt` wrote.
        seed: of the bootstrap.
        cache_dir: see `prepared_dir`.
        batch_size: volumes at a time.
        audit_volumes: for defects that take scans, each read several times; by default 30 phantoms, and no real CT.
        home: hospital that the base model comes from; by default the phantoms' source hospital, or CT-RATE for real CT.
            By default nothing is measured there where the manifest has no test studies of it but those adapted to.
        resamples: of patients, for every interval and p-value.
        known: embeddings that are there already, by model, "base" or "adapted", and split, "valid" or "test".

    Raises:
        FileNotFoundError: no finished run in `output_dir`.
        OSError: nothing can be written there.
        ValueError: a run whose files were changed since; no test studies of the `home` that was given; `known` of
            other studies.
    """
    output_dir, accelerator = Path(output_dir).expanduser(), accelerator_for()
    cache_dir = prepared_dir(manifest_path, output_dir, cache_dir)
    origin, manifest = Origin.of(output_dir), load_manifest(manifest_path)
    with tempfile.TemporaryFile(dir=output_dir):
        pass  # refuses a folder that takes no result
    base = origin.load()
    base_parameters = sum(p.numel() for p in base.model.parameters())
    drawn: dict[str, Any] = {"resamples": resamples, "seed": seed}

    def studies(hospital: str | None, split: str) -> CTReportDataset:
        return load_split(manifest, hospital, split, base.preprocess_config, cache_dir)

    data = {split: studies(origin.hospital, split) for split in ("valid", "test")}
    real, hospitals = any(map(has_file, data["test"].rows)), {row["hospital"] for row in data["test"].rows}
    audit_volumes = (0 if real else 30) if audit_volumes is None else audit_volumes
    comes_from = home or (ctrate.HOSPITAL if real else "source")
    there = set(manifest.loc[manifest["split"] == "test", "hospital"])
    if home or (comes_from in there and hospitals != {comes_from}):
        data["home"] = studies(comes_from, "test")
    scores: dict[str, dict[str, np.ndarray]] = {split: {} for split in data}
    limits, prompts, retrieved, tests = {}, [], [], {}
    for name in ("base", "adapted"):
        model = base.model if name == "base" else load_trained(base.model, output_dir / "adapter")
        classifier = ZeroShotClassifier(model.to(accelerator.device), base.tokenizer)
        seen = {split: known.get((name, split)) or classifier.embed(data[split], batch_size) for split in data}
        for split, embedded in seen.items():
            names = [row["study"] for row in data[split].rows]
            refuse_other_order(embedded.studies, names, f"{name} embedding of {split} in `known`", "row there")
            scores[split][name] = classifier.scores_from_embeddings(embedded.embeddings)
        limits[name] = thresholds_from_validation(seen["valid"].labels, scores["valid"][name])
        tests[name] = test = seen["test"]
        retrieved += _retrieval(name, model, base.tokenizer, data["test"].rows, test, drawn)
        if name == "base":
            answers = {split: Answers(e.labels, scores[split][name], e.patients) for split, e in seen.items()}
            defects = audit(answers["test"], answers["valid"], **drawn) + prompt_mismatch(base, test)
            if audit_volumes and accelerator.is_main_process:
                scans = Changed(data["test"].rows[:audit_volumes], volume_from_row)
                defects += audit_scans(base, scans, test.labels, seed)
        for kind in PROMPTS:
            asked = ZeroShotClassifier(model, base.tokenizer, kind).scores_from_embeddings(test.embeddings)
            draws = mean_draws(test.labels, asked, test.patients, **drawn)
            prompts.append({"set": kind, "model": name} | with_interval("auroc", draws))
    same_studies(tests["base"], tests["adapted"])
    tables, difference = _compared(test, scores["test"], limits, drawn)
    at_home = None
    if "home" in data:
        at_home = Home(comes_from, *_compared(seen["home"], scores["home"], {"base": 0.5, "adapted": 0.5}, drawn))
    world = ctrate.HOSPITAL if hospitals == {ctrate.HOSPITAL} else "real CT" if real else "phantom"
    command = f"medctkit evaluate {output_dir} --manifest {manifest_path} --seed {seed}"
    command += f" --home {home}" if home else ""
    measured = Measurement(
        labels=test.labels,
        patients=test.patients,
        studies=test.studies,
        scores=scores["test"],
        tables=tables,
        difference=difference,
        prompts=pd.DataFrame(prompts),
        retrieval=pd.DataFrame(retrieved, columns=["search", "model", "value", "low", "high", "chance"]),
        adapter=_adapter_facts(model, output_dir / "adapter") | {"base_parameters": base_parameters},
        defects=defects,
        origin=origin,
        made_with=made_with(seed, world) | FACTS | {"command": command, "run": described(output_dir)},
        supervised=finished_run(output_dir)["made_of"]["prompt_weight"] > 0,
        home=at_home,
        clinical=clinical_statistics(
            seen["valid"], test, scores, limits, characteristics(data["test"].rows), resamples, seed
        ),
    )
    if accelerator.is_main_process:
        write_json(measured.summary, output_dir / "metrics.json")
    return measured


def _compared(
    seen: Embedded, scores: dict[str, np.ndarray], limits: dict, drawn: dict
) -> tuple[dict[str, pd.DataFrame], pd.DataFrame]:
    """`Measurement.tables` and `.difference` of both models' scores of the same studies."""
    both, at = ((each["base"], each["adapted"]) for each in (scores, limits))
    base, adapted, difference = evaluate_both(seen.labels, both, seen.patients, at, **drawn)
    return {"base": base, "adapted": adapted}, difference


def _retrieval(name: str, model: Model, tokenizer: Any, rows: list[dict], test: Embedded, drawn: dict) -> list[tuple]:
    """Rows of `Measurement.retrieval`."""
    if len(rows) < 20 or not all(isinstance(row["report"], str) and row["report"].strip() for row in rows):
        return []
    recall = report_to_volume(embed_reports(model, tokenizer, rows, progress=False), test, **drawn)
    found = [
        (f"volume of a report, recall@{k}", name, row["recall"], row["low"], row["high"], row["chance"])
        for k, row in recall.iterrows()
    ]
    mean = volume_to_volume(test, (5, 10), **drawn).loc["mean"]
    for column in ("map@5", "map@10", "map"):
        values = (mean[f"{column}{end}"] for end in ("", "_low", "_high", "_chance"))
        found.append((f"volumes with the same finding, {column.upper()}", name, *values))
    return found


def _adapter_facts(model: Model, folder: Path) -> dict[str, int]:
    """Layers of each encoder that carry the adapter, what was trained (0 layers, where it is no adapter), its bytes."""
    names = getattr(model, "peft_config", ())
    encoders = {"vision": model.vision_encoder, "text": model.text_encoder}
    layers = {side: sum(hasattr(m, "adapter_layer_names") for m in tower.modules()) for side, tower in encoders.items()}
    trained = sum(p.numel() for key, p in model.named_parameters() if set(names) & set(key.split(".")))
    return layers | {"trainable": trained or trained_count(folder), "bytes": trained_bytes(folder)}
