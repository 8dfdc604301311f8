"""What others compute with: scores of each study, tables as CSV and LaTeX; and a base model measured alone."""

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd

from medctkit.cohort import ct_rate
from medctkit.cohort.dataset import load_split, prepared_dir
from medctkit.cohort.manifest import load_manifest
from medctkit.common.atomic import replacing, write_text
from medctkit.common.csv_tables import begins_with, write_table
from medctkit.common.processes import accelerator_for
from medctkit.common.provenance import made_with, write_json
from medctkit.experiments.adapt import Origin
from medctkit.findings import CT_RATE, FINDINGS
from medctkit.metrics.scores import METRICS, evaluate, thresholds_from_validation
from medctkit.training.checkpoints import RECORD
from medctkit.zero_shot.classifier import ZeroShotClassifier

_OF_SCORES = ("study", "patient", "finding", "label")
PUBLISHED = 0.731  # mean AUROC of CT-CLIP, zero-shot, on CT-RATE's validation patients (arXiv 2403.17834)


def scores_file(path: str | os.PathLike) -> Path:
    """The path, if scores can be written there: .csv, or .parquet with pyarrow; asked before hours are spent on them.

    Raises:
        ValueError: neither; a file there that holds something else.
    """
    path = Path(path).expanduser()
    if path.suffix != ".csv" and not (path.suffix == ".parquet" and find_spec("pyarrow")):
        raise ValueError(f"{path}: scores are written as .csv, or as .parquet after pip install pyarrow")
    if path.is_file() and not begins_with(path, _OF_SCORES if path.suffix == ".csv" else ["PAR1"]):
        raise ValueError(f"{path} is there and holds something else than scores; give another name")
    return path


def write_scores(
    path: Path, studies: np.ndarray, patients: np.ndarray, labels: np.ndarray, scores: Mapping[str, np.ndarray]
) -> Path:
    """Write a row for each study and finding: study, patient, finding, label (empty: unknown), probabilities.

    `path` is from `scores_file`; `studies` and `patients` are names (n,), `labels` and each model's `scores` (n, 18).
    """
    k = len(FINDINGS)
    table = pd.DataFrame({"study": np.repeat(studies, k), "patient": np.repeat(patients, k)})
    table["finding"] = np.tile(FINDINGS, len(studies))
    table = table.assign(label=labels.ravel(), **{name: values.ravel() for name, values in scores.items()})
    if path.suffix == ".csv":
        write_table(table, path)
        return path
    with replacing(path) as temporary:
        table.to_parquet(temporary, index=False)
    return path


def write_findings(tables: Mapping[str, pd.DataFrame], folder: Path) -> tuple[Path, Path]:
    """Write named tables of `evaluate` and `compare` as findings.csv (all measures) and findings.tex (AUROC)."""
    wanted = ["positives", "studies", *(f"{metric}{end}" for metric in METRICS for end in ("", "_low", "_high"))]
    flat = pd.concat([t[t.columns.intersection(wanted)].add_prefix(f"{name} ") for name, t in tables.items()], axis=1)
    write_table(flat.rename_axis("finding").reset_index(), folder / "findings.csv")
    names = flat.index.str.replace(r"([&%$#_{}])", r"\\\1", regex=True)
    shown = pd.DataFrame({
        name: [f"{r.auroc:.3f} ({r.auroc_low:.3f} to {r.auroc_high:.3f})" for r in table.itertuples()]
        for name, table in tables.items()
    }, names).rename_axis("AUROC (95 \\% interval)")  # fmt: skip
    write_text(folder / "findings.tex", shown.to_latex().replace("nan (nan to nan)", "--"))
    return folder / "findings.csv", folder / "findings.tex"


def measure_base(
    manifest_path: str | os.PathLike,
    output_dir: str | os.PathLike,
    origin: Origin,
    scores: Path,
    seed: int = 0,
    cache_dir: str | os.PathLike | None = None,
    batch_size: int = 32,
) -> str:
    """Score a base model alone, zero-shot, on the test patients of a hospital; says what came out, in lines.

    Writes `base.json`, tables, and what `scores_file` allows as `scores`. Thresholds come from validation patients,
    where there are any, else they are 0.5; no AUROC depends on them. `origin` is model and hospital; for
    `manifest_path`, `output_dir`, `seed`, `cache_dir` and `batch_size` see `measure.measure`.

    Raises:
        ValueError: no such test studies; the folder of a run.
    """
    output_dir, manifest, base = Path(output_dir).expanduser(), load_manifest(manifest_path), origin.load()
    if (output_dir / RECORD).is_file():
        raise ValueError(f"{output_dir} is of a run, whose scores and tables would be replaced; give another folder")
    output_dir.mkdir(parents=True, exist_ok=True)
    classifier = ZeroShotClassifier(base.model.to(accelerator_for().device), base.tokenizer)
    prepared = prepared_dir(manifest_path, output_dir, cache_dir)
    there = manifest if origin.hospital is None else manifest[manifest["hospital"] == origin.hospital]
    limits: np.ndarray | float = 0.5
    for split in ("valid", "test") if "valid" in set(there["split"]) else ("test",):
        dataset = load_split(manifest, origin.hospital, split, base.preprocess_config, prepared)
        seen = classifier.embed(dataset, batch_size)
        found = classifier.scores_from_embeddings(seen.embeddings)
        if split == "valid":
            limits = thresholds_from_validation(seen.labels, found)
    if not accelerator_for().is_main_process:
        return ""
    table = evaluate(seen.labels, found, seen.patients, limits, seed=seed)
    ends = {"value": "auroc", "low": "auroc_low", "high": "auroc_high"}
    auroc = {end: round(table.loc["mean", column], 4) for end, column in ends.items()}
    hospitals = sorted(set(there.loc[there["split"] == "test", "hospital"]))
    content = {"auroc": auroc, "studies": len(seen.studies), "hospitals": hospitals}
    write_json(content | {"made_with": made_with(seed, ", ".join(hospitals))}, output_dir / "base.json")
    written = [write_scores(scores, seen.studies, seen.patients, seen.labels, {"base": found})]
    written += write_findings({"base": table}, output_dir)
    said = "mean AUROC {value:.3f} [{low:.3f}, {high:.3f}]".format(**auroc)
    said += f" on {len(seen.studies):,} studies of {', '.join(hospitals)}"
    if hospitals == [ct_rate.HOSPITAL] and FINDINGS == CT_RATE:
        holds = "holds" if auroc["low"] <= PUBLISHED <= auroc["high"] else "does not hold"
        said += f"\nCT-CLIP published {PUBLISHED} for CT-RATE's validation patients; the interval {holds} it"
    return "\n".join([said, *(f"wrote {path}" for path in written)])
