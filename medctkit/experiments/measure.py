"""Base and adapted model on the test studies of a hospital: everything that the reproduction report shows.

Each volume is embedded once for each model; other prompts, retrieval and most of the audit come from the embeddings.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medctkit.cohort import ct_rate as ctrate
from medctkit.cohort.dataset import load_split, prepared_dir
from medctkit.cohort.manifest import has_file, load_manifest, volume_from_row
from medctkit.common.processes import accelerator_for
from medctkit.common.provenance import made_with, write_json
from medctkit.experiments.adapt import Origin
from medctkit.experiments.audit import Answers, Defect, audit, audit_scans, prompt_mismatch
from medctkit.lora.adapter import load_adapter
from medctkit.lora.methods import trained_bytes
from medctkit.metrics.scores import compare, evaluate, summary, thresholds_from_validation
from medctkit.model.protocol import Model
from medctkit.zero_shot.classifier import Embedded, ZeroShotClassifier
from medctkit.zero_shot.embeddings import same_studies
from medctkit.zero_shot.prompts import PROMPTS
from medctkit.zero_shot.retrieval import embed_reports, report_to_volume, volume_to_volume

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Measurement:
    """What the reproduction report is made from.

    Attributes:
        labels: (n, 18) of the test studies.
        patients: (n,) names.
        scores: (n, 18) probabilities for "base" and "adapted".
        tables: see `medctkit.metrics.scores.evaluate`, for both; thresholds are from validation studies.
        difference: see `medctkit.metrics.scores.compare`, adapted minus base.
        prompts: mean AUROC of both models with every set of prompts.
        retrieval: see `zero_shot.retrieval`; empty where there are fewer than 20 studies, or one without a report.
        adapter: `vision` and `text`, adapted layers in each encoder; `trainable` and `bytes` of the adapter;
            `base_parameters`.
        defects: what the public evaluation would have made of the base model here.
        origin: base model and hospital.
        made_with: see `made_with`, and the command.
    """

    labels: np.ndarray
    patients: np.ndarray
    scores: dict[str, np.ndarray]
    tables: dict[str, "pd.DataFrame"]
    difference: "pd.DataFrame"
    prompts: "pd.DataFrame"
    retrieval: "pd.DataFrame"
    adapter: dict[str, int]
    defects: list[Defect]
    origin: Origin
    made_with: dict

    @property
    def summary(self) -> dict:
        """What is in metrics.json."""
        means = summary(self.tables["base"], self.tables["adapted"], self.difference)
        return means | {"made_with": self.made_with}


def measure(
    manifest_path: str | os.PathLike,
    output_dir: str | os.PathLike,
    seed: int = 0,
    cache_dir: str | os.PathLike | None = None,
    batch_size: int = 32,
    audit_volumes: int | None = None,
) -> Measurement:
    """Score base and adapted model on the hospital's test patients; write `metrics.json`.

    Thresholds come from validation patients, intervals from a bootstrap over test patients.

    Args:
        manifest_path: usually `data_manifest.csv`.
        output_dir: where `adapt` wrote.
        seed: of the bootstrap.
        cache_dir: see `prepared_dir`.
        batch_size: volumes at a time.
        audit_volumes: for defects that take scans, each read several times; by default 30 phantoms, and no real CT.

    Raises:
        FileNotFoundError: no finished run in `output_dir`.
        ValueError: a run whose files were changed since.
    """
    import pandas as pd

    output_dir, accelerator = Path(output_dir).expanduser(), accelerator_for()
    cache_dir = prepared_dir(manifest_path, output_dir, cache_dir)
    origin, manifest = Origin.of(output_dir), load_manifest(manifest_path)
    base = origin.load()
    base_parameters = base.model.num_parameters()
    data = {s: load_split(manifest, origin.hospital, s, base.preprocess_config, cache_dir) for s in ("valid", "test")}
    real = any(map(has_file, data["test"].rows))
    audit_volumes = (0 if real else 30) if audit_volumes is None else audit_volumes
    tables, scores, limits, prompts, retrieved, tests = {}, {}, {}, [], [], {}
    for name in ("base", "adapted"):
        model = base.model if name == "base" else load_adapter(base.model, output_dir / "adapter")
        classifier = ZeroShotClassifier(model.to(accelerator.device), base.tokenizer)
        seen = {split: classifier.embed(dataset, batch_size) for split, dataset in data.items()}
        found = {split: classifier.scores_from_embeddings(e.embeddings) for split, e in seen.items()}
        limits[name] = thresholds_from_validation(seen["valid"].labels, found["valid"])
        scores[name], test = found["test"], seen["test"]
        tests[name] = test
        tables[name] = evaluate(test.labels, scores[name], test.patients, limits[name], seed=seed)
        retrieved += _retrieval(name, model, base.tokenizer, data["test"].rows, test, seed)
        if name == "base":
            answers = {split: Answers(e.labels, found[split], e.patients) for split, e in seen.items()}
            defects = audit(answers["test"], answers["valid"], seed=seed) + prompt_mismatch(base, test)
            if audit_volumes and accelerator.is_main_process:
                defects += audit_scans(base, _Volumes(data["test"].rows[:audit_volumes]), test.labels, seed)
        for kind in PROMPTS:
            asked = ZeroShotClassifier(model, base.tokenizer, kind).scores_from_embeddings(test.embeddings)
            mean = evaluate(test.labels, asked, test.patients, seed=seed).loc["mean"]
            prompts.append({"set": kind, "model": name} | mean[["auroc", "auroc_low", "auroc_high"]].to_dict())
    same_studies(tests["base"], tests["adapted"])
    difference = compare(
        test.labels, scores["base"], scores["adapted"], test.patients, limits["base"], limits["adapted"], seed=seed
    )
    only_ct_rate = {row["hospital"] for row in data["test"].rows} == {ctrate.HOSPITAL}
    world = ctrate.HOSPITAL if only_ct_rate else "real CT" if real else "phantom"
    command = f"medctkit evaluate {output_dir} --manifest {manifest_path} --seed {seed}"
    measured = Measurement(
        labels=test.labels,
        patients=test.patients,
        scores=scores,
        tables=tables,
        difference=difference,
        prompts=pd.DataFrame(prompts),
        retrieval=pd.DataFrame(retrieved, columns=["search", "model", "value", "low", "high", "chance"]),
        adapter=_adapter_facts(model, output_dir / "adapter") | {"base_parameters": base_parameters},
        defects=defects,
        origin=origin,
        made_with=made_with(seed, world) | {"command": command},
    )
    if accelerator.is_main_process:
        write_json(measured.summary, output_dir / "metrics.json")
    return measured


def _retrieval(name: str, model: Model, tokenizer: Any, rows: list[dict], test: Embedded, seed: int) -> list[tuple]:
    """Rows of `Measurement.retrieval`."""
    if len(rows) < 20 or not all(isinstance(row["report"], str) and row["report"].strip() for row in rows):
        return []
    recall = report_to_volume(embed_reports(model, tokenizer, rows, progress=False), test, seed=seed)
    found = [
        (f"volume of a report, recall@{k}", name, row["recall"], row["low"], row["high"], row["chance"])
        for k, row in recall.iterrows()
    ]
    mean = volume_to_volume(test, (5, 10), seed=seed).loc["mean"]
    for column in ("map@5", "map@10", "map"):
        values = (mean[f"{column}{end}"] for end in ("", "_low", "_high", "_chance"))
        found.append((f"volumes with the same finding, {column.upper()}", name, *values))
    return found


class _Volumes(Sequence):
    """The scans of rows of a manifest in HU, read when asked for."""

    def __init__(self, rows: list[dict]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return volume_from_row(self.rows[index])


def _adapter_facts(model: Model, folder: Path) -> dict[str, int]:
    """Layers of each encoder that carry the adapter, its parameters, and its bytes on disk."""
    names, encoders = model.active_adapters, {"vision": model.vision_encoder, "text": model.text_encoder}
    layers = {side: sum(hasattr(m, "adapter_layer_names") for m in tower.modules()) for side, tower in encoders.items()}
    return layers | {
        "trainable": sum(p.numel() for key, p in model.named_parameters() if set(names) & set(key.split("."))),
        "bytes": trained_bytes(folder),
    }
