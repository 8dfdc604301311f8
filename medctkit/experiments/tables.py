"""What others compute with: scores of each study, tables as CSV and LaTeX; and a base model measured alone."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medctkit.cohort import ct_rate
from medctkit.cohort.dataset import load_split, prepared_dir
from medctkit.cohort.manifest import load_manifest
from medctkit.common.atomic import replacing
from medctkit.common.csv_tables import write_table
from medctkit.common.processes import accelerator_for
from medctkit.common.provenance import made_with, write_json
from medctkit.experiments.adapt import Origin
from medctkit.findings import FINDINGS
from medctkit.metrics.bootstrap import RESAMPLES
from medctkit.metrics.scores import METRICS, evaluate, thresholds_from_validation
from medctkit.zero_shot.classifier import Embedded, ZeroShotClassifier

if TYPE_CHECKING:
    import pandas as pd

PUBLISHED = 0.731  # mean AUROC of CT-CLIP, zero-shot, on CT-RATE's validation patients (arXiv 2403.17834)


def scores_file(path: str | os.PathLike) -> Path:
    """Where scores are to go, before hours are spent on them.

    Raises:
        ValueError: neither .csv nor .parquet.
        ImportError: Parquet, and no pyarrow.
    """
    path = Path(path).expanduser()
    if path.suffix not in (".csv", ".parquet"):
        raise ValueError(f"{path}: scores are written as .csv or .parquet")
    if path.suffix == ".parquet":
        try:
            import pyarrow  # type: ignore[import-untyped]  # noqa: F401
        except ImportError:
            raise ImportError(f"{path} needs pyarrow: pip install pyarrow, or name a .csv") from None
    return path


def write_scores(
    path: str | os.PathLike,
    studies: np.ndarray,
    patients: np.ndarray,
    labels: np.ndarray,
    scores: Mapping[str, np.ndarray],
) -> Path:
    """Write a row for each study and finding: study, patient, finding, label (empty: unknown), probabilities.

    Args:
        path: see `scores_file`.
        studies: (n,) names.
        patients: (n,) names.
        labels: (n, 18).
        scores: for each model (n, 18).
    """
    import pandas as pd

    path = scores_file(path)
    table = pd.DataFrame(
        {"study": np.repeat(studies, len(FINDINGS)), "patient": np.repeat(patients, len(FINDINGS))}
        | {"finding": np.tile(FINDINGS, len(studies)), "label": labels.ravel()}
        | {name: values.ravel() for name, values in scores.items()}
    )
    if path.suffix == ".csv":
        write_table(table, path)
    else:
        with replacing(path) as temporary:
            table.to_parquet(temporary, index=False)
    return path


def write_findings(tables: "Mapping[str, pd.DataFrame]", folder: str | os.PathLike) -> tuple[Path, Path]:
    """Write tables of `evaluate` and `compare`, by name, as findings.csv (all numbers) and findings.tex (AUROC)."""
    import pandas as pd

    folder = Path(folder)
    flat = {
        f"{name} {column}": table[column]
        for name, table in tables.items()
        for column in table.columns
        if column.removesuffix("_low").removesuffix("_high") in (*METRICS, "positives", "studies")
    }
    write_table(pd.DataFrame(flat).rename_axis("finding").reset_index(), folder / "findings.csv")
    shown = {
        name: [f"{row.auroc:.3f} ({row.auroc_low:.3f} to {row.auroc_high:.3f})" for row in table.itertuples()]
        for name, table in tables.items()
    }
    text = pd.DataFrame(shown, next(iter(tables.values())).index).rename_axis("AUROC (95 \\% interval)").to_latex()
    with replacing(folder / "findings.tex") as temporary:
        temporary.write_text(text.replace("nan (nan to nan)", "--"), encoding="utf-8")
    return folder / "findings.csv", folder / "findings.tex"


def measure_base(
    manifest_path: str | os.PathLike,
    output_dir: str | os.PathLike,
    origin: Origin,
    seed: int = 0,
    cache_dir: str | os.PathLike | None = None,
    batch_size: int = 32,
    scores: str | os.PathLike | None = None,
    resamples: int = RESAMPLES,
) -> str:
    """Score a base model alone, zero-shot, on the test patients of a hospital; no run is needed.

    Writes `base.json`, scores and tables into `output_dir`. Thresholds come from validation patients, where there are
    any, else they are 0.5; no AUROC depends on them.

    Args:
        manifest_path: usually `data_manifest.csv`.
        output_dir: a folder.
        origin: base model and hospital.
        seed: of the bootstrap.
        cache_dir: see `prepared_dir`.
        batch_size: volumes at a time.
        scores: see `scores_file`; by default `scores.csv` in `output_dir`.
        resamples: of patients.

    Returns:
        What came out, in lines.

    Raises:
        ValueError: no such test studies.
    """
    output_dir = Path(output_dir).expanduser()
    file = scores_file(output_dir / "scores.csv" if scores is None else scores)
    manifest, base = load_manifest(manifest_path), origin.load()
    classifier = ZeroShotClassifier(base.model.to(accelerator_for().device), base.tokenizer)
    prepared = prepared_dir(manifest_path, output_dir, cache_dir)

    def seen(split: str) -> tuple[Embedded, np.ndarray]:
        dataset = load_split(manifest, origin.hospital, split, base.preprocess_config, prepared)
        embedded = classifier.embed(dataset, batch_size)
        return embedded, classifier.scores_from_embeddings(embedded.embeddings)

    test, found = seen("test")
    chosen = manifest if origin.hospital is None else manifest[manifest["hospital"] == origin.hospital]
    limits: np.ndarray | float = 0.5
    if "valid" in set(chosen["split"]):
        valid, of_valid = seen("valid")
        limits = thresholds_from_validation(valid.labels, of_valid)
    table = evaluate(test.labels, found, test.patients, limits, resamples=resamples, seed=seed)
    if not accelerator_for().is_main_process:
        return ""
    output_dir.mkdir(parents=True, exist_ok=True)
    value, low, high = table.loc["mean", ["auroc", "auroc_low", "auroc_high"]].tolist()
    auroc = {"value": round(value, 4), "low": round(low, 4), "high": round(high, 4)}
    hospitals = sorted(set(chosen.loc[chosen["split"] == "test", "hospital"]))
    data = {"studies": len(test.studies), "hospitals": hospitals}
    write_json({"auroc": auroc} | data | {"made_with": made_with(seed, ", ".join(hospitals))}, output_dir / "base.json")
    written = [write_scores(file, test.studies, test.patients, test.labels, {"base": found})]
    written += write_findings({"base": table}, output_dir)
    said = [
        f"mean AUROC {value:.3f} [{low:.3f}, {high:.3f}] on {len(test.studies):,} studies of {', '.join(hospitals)}"
    ]
    if hospitals == [ct_rate.HOSPITAL]:
        holds = "holds" if low <= PUBLISHED <= high else "does not hold"
        said.append(f"CT-CLIP published {PUBLISHED} for CT-RATE's validation patients; the interval {holds} it")
    return "\n".join([*said, *(f"wrote {path}" for path in written)])
