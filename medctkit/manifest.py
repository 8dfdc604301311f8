"""`data_manifest.csv`: one row per study, its schema, and the default phantom cohort.

A row holds study, patient, split, hospital, seed, scan, reconstruction, the 18 labels, the report and a
checksum; everything about a phantom can be made again from it. Real data add a column `path`.
Names imitate CT-RATE's: patient, scan letter, reconstruction number, as in `target_train_0012_a_1`.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from medctkit.findings import FINDINGS
from medctkit.phantom import HOSPITALS, TRAINING_SHAPE, PhantomStudy, generate, named_rng

if TYPE_CHECKING:
    import pandas as pd

TEXT_COLUMNS = ("study", "patient", "split", "hospital", "scan", "report", "checksum", "path")
COLUMNS = ("study", "patient", "split", "hospital", "seed", "scan", "reconstruction", *FINDINGS, "report", "checksum")
SPLITS = ("train", "valid", "test")
# Patients of the default cohort. The base model never sees the target hospital before notebook 03, and what
# it was pretrained on is not listed here: `medctkit.pretrain` draws those studies from seeds of its own.
DEFAULT_PATIENTS = {
    ("source", "test"): 300,
    ("target", "train"): 900,
    ("target", "valid"): 150,
    ("target", "test"): 300,
}


def phantom_checksum(study: PhantomStudy) -> str:
    """SHA-256 over the voxels (int16, C order) and the report."""
    return hashlib.sha256(study.volume.hu.tobytes() + study.report.encode()).hexdigest()


def study_from_row(row: Mapping, shape: tuple[int, int, int] = TRAINING_SHAPE) -> PhantomStudy:
    """Make the phantom of a row again, at its own or any other resolution (d, h, w)."""
    present = [name for name in FINDINGS if row[name]]
    reconstruction = int(row["reconstruction"])
    return generate(
        int(row["seed"]), row["hospital"], present, shape, patient=row["patient"], reconstruction=reconstruction
    )


def verify_row(row: Mapping) -> None:
    """Make the phantom of a row again and compare.

    Raises:
        ValueError: it is not the one the manifest describes.
    """
    found = phantom_checksum(study_from_row(row))
    if found != row["checksum"]:
        raise ValueError(
            f"study {row['study']}: made again it has checksum {found[:12]}..., the manifest says "
            f"{str(row['checksum'])[:12]}...; the generator has changed since the manifest was written. "
            "`medctkit manifest` writes it anew"
        )


def validate_manifest(table: "pd.DataFrame") -> "pd.DataFrame":
    """Check a manifest; returns it unchanged.

    Raises:
        ValueError: names the row (as in the file, the header being row 1), the column and the value that is wrong.
    """
    missing = [name for name in COLUMNS if name not in table.columns]
    if missing:
        raise ValueError(f"the manifest lacks the column(s) {missing}; expected {list(COLUMNS)}")
    if not len(table):
        raise ValueError("the manifest has no rows")
    checks = {
        "split": (table["split"].isin(SPLITS), f"one of {SPLITS}"),
        "hospital": (
            table["hospital"].isin(HOSPITALS) if "path" not in table else table["hospital"].notna(),
            f"one of {sorted(HOSPITALS)}",
        ),
        "study": (table["study"].notna() & ~table["study"].duplicated(), "a name that occurs once"),
        "patient": (table["patient"].notna(), "a name"),
        "seed": (table["seed"].map(_is_whole), "a whole number >= 0"),
        "reconstruction": (table["reconstruction"].map(_is_whole), "a whole number >= 0"),
        "report": (table["report"].map(lambda r: isinstance(r, str) and bool(r.strip())), "a text"),
        "checksum": (table["checksum"].astype(str).str.fullmatch("[0-9a-f]{64}"), "64 hexadecimal digits"),
    }
    checks |= {name: (table[name].isin((0, 1)), "0 or 1") for name in FINDINGS}
    for column, (fine, expected) in checks.items():
        if not fine.all():
            at = int((~fine.to_numpy(dtype=bool)).argmax())
            raise ValueError(
                f"manifest row {at + 2}, column {column!r}: got {table[column].iloc[at]!r}, expected {expected}"
            )
    splits = table.groupby("patient")["split"].nunique()
    if (splits > 1).any():
        patient = splits.index[(splits > 1).to_numpy()][0]
        found = sorted(set(table.loc[table["patient"] == patient, "split"]))
        raise ValueError(
            f"patient {patient!r} is in the splits {found}: all scans of a patient belong into one split, or the "
            "test measures memory"
        )
    return table


def _is_whole(value) -> bool:
    try:
        return int(value) == float(value) and int(value) >= 0
    except (TypeError, ValueError):
        return False


def load_manifest(path: str | os.PathLike) -> "pd.DataFrame":
    """Read and check a manifest.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a table, or see `validate_manifest`.
    """
    import pandas as pd

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no manifest at {path}; `medctkit manifest` writes the default one")
    try:
        # as text, or patient "007" would become 7
        table = pd.read_csv(path, dtype=dict.fromkeys(TEXT_COLUMNS, str))
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a readable CSV table: {error}") from None
    return validate_manifest(table)


def write_manifest(table: "pd.DataFrame", path: str | os.PathLike) -> Path:
    """Check a manifest and write it, whole or not at all."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    validate_manifest(table).to_csv(temporary, index=False, lineterminator="\n")
    os.replace(temporary, path)
    return path


def _rows_of_patient(task: tuple[str, str, int]) -> list[dict]:
    """All studies of one patient: one to three scans, each in one or two reconstructions."""
    hospital, split, number = task
    patient = f"{hospital}_{split}_{number:04d}"
    rng = named_rng("cohort", patient)
    rows = []
    for letter in "abc"[: int(rng.choice([1, 2, 3], p=[0.82, 0.14, 0.04]))]:
        seed = int(rng.integers(2**31))
        labels = None
        for reconstruction in range(int(rng.choice([1, 2], p=[0.8, 0.2]))):
            study = generate(seed, hospital, patient=patient, reconstruction=reconstruction)
            if labels is None:
                labels = study.labels
            row = dict(study=f"{patient}_{letter}_{reconstruction + 1}", patient=patient, split=split)
            row |= dict(hospital=hospital, seed=seed, scan=letter, reconstruction=reconstruction, **labels)
            rows.append(row | dict(report=study.report, checksum=phantom_checksum(study)))
    return rows


def build_default_manifest(patients: Mapping[tuple[str, str], int] | None = None, workers: int | None = None):
    """Generate the default phantom cohort's manifest (DataFrame), in the order of hospital, split and patient.

    Args:
        patients: how many for each (hospital, split); `DEFAULT_PATIENTS` by default.
        workers: processes; by default one per core.
    """
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    import pandas as pd
    from tqdm.auto import tqdm

    patients = DEFAULT_PATIENTS if patients is None else patients
    tasks = [(hospital, split, i) for (hospital, split), n in patients.items() for i in range(1, n + 1)]
    with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=get_context("spawn")) as pool:
        found = list(tqdm(pool.map(_rows_of_patient, tasks, chunksize=8), total=len(tasks), desc="patients"))
    return validate_manifest(pd.DataFrame([row for rows in found for row in rows], columns=list(COLUMNS)))
