"""`data_manifest.csv`: one row per study, its schema, and the default phantom cohort.

A row holds study, patient, split, hospital, seed, scan, reconstruction, the 18 labels, the report and a
checksum. A phantom can be made again from its row. A real scan has a `path`: of it, `seed` may be empty, the
hospital has any name, the checksum is the SHA-256 of the file (empty until `medctkit prepare` fills it in),
and further columns say how to read the file (`READING`, empty where the file itself knows) and where its `masks` are
(see `nodules`). A table may hold both. Other columns are kept as they are.
Names imitate CT-RATE's: patient, scan letter, reconstruction number, as in `target_train_0012_a_1`.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations, product
from math import inf
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from medctkit.common.csv_tables import (
    check_columns,
    first_row,
    given,
    read_table,
    refuse_wrong,
    to_numbers,
    write_table,
)
from medctkit.common.processes import worker_pool
from medctkit.common.text import folded
from medctkit.findings import CT_RATE, FINDINGS, VARIABLE, refuse_other_findings
from medctkit.phantom.study import HOSPITALS, TRAINING_SHAPE, PhantomStudy, generate, named_rng
from medctkit.scans.geometry import STEP_RANGE
from medctkit.scans.volumes import CTVolume, read_volume

COLUMNS = ("study", "patient", "split", "hospital", "seed", "scan", "reconstruction", *FINDINGS, "report", "checksum")
SPACING = ("spacing_d", "spacing_h", "spacing_w")  # mm, in place of a blank or wrong header
_CHOICES = ("orientation", "series", "stored_as", "crop", "acquisition")
READING = ("rescale_slope", "rescale_intercept", *SPACING, *_CHOICES, "largest_gap", "resample")
SPLITS = ("train", "valid", "test")
# Patients of the default cohort. The base model never sees the target hospital before notebook 03, and what
# it was pretrained on is not listed here: `medctkit.experiments.pretrain` draws those studies from seeds of its own.
DEFAULT_PATIENTS = {
    ("source", "test"): 300,
    ("target", "train"): 900,
    ("target", "valid"): 150,
    ("target", "test"): 300,
}
_FILES = ("path", "masks")
_NAMES = ("study", "patient", "split", "hospital", "scan", "checksum", *_FILES, *_CHOICES)
_NUMBERS = ("seed", "reconstruction", *FINDINGS, *READING[:5], "largest_gap", "resample")
_ORIENTATIONS = {
    "stored",
    "canonical",
    *("".join(letters) for axes in permutations(("RL", "AP", "SI")) for letters in product(*axes)),
}


def _plain(name: str) -> str:
    return "".join(filter(str.isalnum, str(name))).lower()


for _name in FINDINGS:
    if _plain(_name) in map(_plain, (*COLUMNS[:7], *COLUMNS[-2:], *READING, *_FILES)):
        raise ValueError(
            f"{VARIABLE}: {_name!r} is a column that manifests have already; give the finding another name"
        )


def phantom_checksum(study: PhantomStudy) -> str:
    """SHA-256 over the voxels (int16, C order) and the report."""
    return hashlib.sha256(study.volume.hu.tobytes() + study.report.encode()).hexdigest()


def study_from_row(row: Mapping, shape: tuple[int, int, int] = TRAINING_SHAPE) -> PhantomStudy:
    """Make the phantom of a row again, at its own or any other resolution (d, h, w).

    Raises:
        ValueError: the row is a real scan's and has no seed.
    """
    if is_empty(row["seed"]):
        raise ValueError(f"study {row['study']} has no seed: it is a real scan, which volume_from_row reads")
    present = [name for name in CT_RATE if row[name]]
    return generate(
        int(row["seed"]),
        row["hospital"],
        present,
        shape,
        patient=row["patient"],
        reconstruction=int(row["reconstruction"]),
    )


def reading_arguments(row: Mapping) -> dict[str, Any]:
    """Keyword arguments of `read_volume` for a row with a `path`, as far as it gives them; spacing (d, h, w) in mm."""
    here = {name: row[name] for name in READING if name in row and not is_empty(row[name])}
    arguments: dict[str, Any] = {"path": str(row["path"])}
    numbers = ("rescale_slope", "rescale_intercept", "largest_gap")
    arguments |= {name: float(here[name]) for name in numbers if name in here}
    if SPACING[0] in here:
        arguments["spacing"] = tuple(float(here[name]) for name in SPACING)
    arguments |= {"resample": True} if here.get("resample") else {}
    return arguments | {name: str(here[name]) for name in _CHOICES if name in here}


def volume_from_row(row: Mapping) -> CTVolume:
    """The scan of a row: its file read, or its phantom made.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: see `read_volume`.
    """
    return read_volume(**reading_arguments(row)) if has_file(row) else study_from_row(row).volume


def has_file(row: Mapping) -> bool:
    """Whether a row is a real scan, which is read from its `path`; a phantom is made from its seed."""
    return not is_empty(row.get("path"))


def is_empty(value: Any) -> bool:
    """None, NaN, pandas' NA, or a blank text."""
    return bool(pd.isna(value)) or not str(value).strip()


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


def validate_manifest(table: pd.DataFrame, rows: Sequence[int] | None = None) -> pd.DataFrame:
    """Check a manifest; returns it unchanged.

    Args:
        table: the manifest.
        rows: the row of the file that each row comes from; by default 2, 3, ... below the header in row 1.

    Raises:
        ValueError: names the rows (as in the file), the columns and the values that are wrong: a wrong cell,
            reconstructions of one scan that disagree, a scan that is listed twice, a patient in two splits; a phantom,
            where findings other than CT-RATE's are in use.
    """
    check_columns(table.columns, COLUMNS, "the manifest")
    _refuse_misspelt(table.columns)
    if not len(table):
        raise ValueError("the manifest has no rows")
    numbered = table.set_axis(range(2, len(table) + 2) if rows is None else list(rows))
    real = given(numbered["path"]) if "path" in table else given(numbered["study"]) & False
    if not real.all():
        refuse_other_findings(f"row {numbered.index[~real][0]} of the manifest has no path, so it is a phantom")
    refuse_wrong("manifest", numbered, [*_cell_rules(numbered, real), *_reading_rules(numbered, real)])
    refuse_wrong("manifest", numbered, [_split_rule(numbered)])
    refuse_wrong("manifest", numbered, _scan_rules(numbered))
    return table


def _refuse_misspelt(columns: Sequence[str]) -> None:
    """An optional column by another spelling would be kept, unread: a scan would lose its slope."""
    absent = {_plain(name): name for name in (*READING, "path") if name not in columns}
    for name in columns:
        if _plain(name) in absent:
            raise ValueError(f"the manifest has a column {name!r}; write it {absent[_plain(name)]!r}")


def _cell_rules(table: pd.DataFrame, real: pd.Series) -> Iterator[tuple]:
    """(column, wrong rows, what was expected) for everything that a cell alone can have wrong.

    `real`: which rows are real scans.
    """
    for name in ("study", "patient", "hospital", "scan"):
        text = table[name].astype(str)
        yield name, ~given(table[name]) | (text.str.strip() != text), "a name, without spaces around it"
        number = given(table[name]) & ~table[name].map(lambda cell: isinstance(cell, str)).astype(bool)
        yield name, number, "text: 007 is not 7, nor 1E5 100000; load_manifest reads names as they were written"
    yield "study", given(table["study"]) & table["study"].duplicated(), "a name that occurs once"
    phantoms = sorted(HOSPITALS)
    elsewhere = ~real & given(table["hospital"]) & ~table["hospital"].isin(phantoms)
    yield "hospital", elsewhere, f"one of {phantoms} for a phantom; a real scan needs a path"
    yield "split", ~table["split"].isin(SPLITS), f"one of {SPLITS}"
    yield "seed", ~table["seed"].map(_is_whole) & (~real | given(table["seed"])), "a whole number >= 0"
    yield "reconstruction", ~table["reconstruction"].map(_is_whole), "a whole number >= 0"
    yield "report", ~table["report"].map(lambda r: isinstance(r, str) and bool(r.strip())), "a text"
    for name in table.select_dtypes(exclude="number"):
        yield name, table[name].map(lambda cell: isinstance(cell, str) and "\0" in cell), "a text without NUL bytes"
    digits = table["checksum"].astype(str).str.fullmatch("[0-9a-f]{64}").astype(bool)
    unfilled = real & ~given(table["checksum"])
    yield "checksum", ~digits & ~unfilled, "64 hexadecimal digits in small letters"
    for name in FINDINGS:
        unknown = real & ~given(table[name])
        yield name, ~table[name].isin((0, 1)) & ~unknown, "0 or 1, or nothing for a real scan: unknown"


def _reading_rules(table: pd.DataFrame, real: pd.Series) -> Iterator[tuple]:
    """The same for the columns that say how to read a file."""
    filled = {name: given(table[name]) if name in table else real & False for name in READING}
    for name in table.columns.intersection(READING):
        yield name, filled[name] & ~real, "nothing: a phantom (no path) is made, not read"
    for name, low, high, expected in (
        ("rescale_slope", 0.0, inf, "a number above 0"),
        ("rescale_intercept", -inf, inf, "a number"),
        ("largest_gap", 0.0, inf, "a length in mm"),
        *((name, *STEP_RANGE, f"a length from {STEP_RANGE[0]} to {STEP_RANGE[1]} mm") for name in SPACING),
    ):
        if name in table:
            value = pd.to_numeric(table[name].where(real), errors="coerce")
            inside = value.between(low, high, inclusive="both" if name in SPACING else "neither")
            yield name, filled[name] & real & ~inside, expected
    if "resample" in table:
        yield "resample", filled["resample"] & ~table["resample"].isin((0, 1)), "1 to resample; 0 or nothing not to"
    lengths = sum(filled[name].astype(int) for name in SPACING)
    for name in SPACING:
        wrong = lengths.between(1, 2) & ~filled[name]
        if name in table:
            yield name, wrong, f"a length in mm: spacing needs all of {list(SPACING)}"
        elif wrong.any():
            raise ValueError(f"the manifest lacks the column {name!r}: spacing needs all of {list(SPACING)}")
    if "orientation" in table:
        known = table["orientation"].astype(str).isin(_ORIENTATIONS)
        expected = "'stored', 'canonical' or one each of R/L, A/P and S/I, such as 'SPL'"
        yield "orientation", filled["orientation"] & ~known, expected


def _scan_rules(table: pd.DataFrame) -> Iterator[tuple]:
    """The same for what rows have wrong against each other; every cell alone is right already."""
    row = table.index.astype(str)
    scan = table.groupby(["patient", "scan"], sort=False).ngroup()
    first = first_row(table, scan)
    for name in ("hospital", "report", *FINDINGS):
        # an unknown label differs from a known one
        values = table[name].fillna(-1) if name in FINDINGS else table[name]
        differs = values.groupby(scan).transform("first") != values
        yield name, differs, "that of row " + first + ", another reconstruction of the same scan"
    earlier = first_row(table, [scan, table["reconstruction"].astype(float)])
    yield "reconstruction", earlier != row, "another number: row " + earlier + " is this reconstruction of this scan"
    if "path" in table:
        file = table["path"].where(given(table["path"])).map(_file_at, na_action="ignore")
        chosen = [table[name].fillna("").astype(str) for name in ("series", "acquisition") if name in table]
        earlier = first_row(table, [file, *chosen])
        yield "path", earlier.notna() & (earlier != row), "another file: row " + earlier + " is this scan already"
        first = table["split"].groupby([file, _series(table, file)]).transform("first")
        expected = first + ": another row has this file or folder, which is one patient's, in that split"
        yield "split", first.notna() & (first != table["split"]), expected
    twins = _twins(table)
    last = twins.groupby("twins")[["study", "split"]].transform("last").reindex(table.index)
    elsewhere = last["split"].notna() & (last["split"] != table["split"])
    expected = "another scan: study " + table["study"].astype(str) + " is the same as " + last["study"]
    yield "checksum", elsewhere, expected + " in the split " + last["split"]


def _series(table: pd.DataFrame, of: pd.Series) -> pd.Series:
    """Which series a row has `of` a file or folder; "" for all rows of one where not every row gives a UID.

    Two UIDs are two scans; of a number, a description or nothing that can't be said.
    """
    uid = table["series"].fillna("").astype(str) if "series" in table else pd.Series("", index=table.index)
    vague = ~uid.str.fullmatch(r"\d+(\.\d+)+")
    return uid.mask(vague.groupby(of).transform("any").fillna(True).astype(bool), "")


def _file_at(path: str) -> str:
    """What a path leads to, the same for all links to one file."""
    try:
        found = os.stat(os.path.expanduser(str(path)))
    except OSError:
        return os.path.normpath(str(path))
    return f"{found.st_dev} {found.st_ino}"


def _twins(table: pd.DataFrame) -> pd.DataFrame:
    """Rows whose volumes are equal, and equal in more than one split, with their number in `twins`; test comes last."""
    known = table[given(table["checksum"])]
    known = known.assign(twins=known.groupby(["checksum", _series(known, known["checksum"])]).ngroup())
    known = known[known.groupby("twins")["split"].transform("nunique") > 1]
    return known.sort_values("split", key=lambda split: split.map(SPLITS.index), kind="stable")


def without_leaks(table: pd.DataFrame) -> tuple[pd.DataFrame, list[dict]]:
    """A prepared manifest without patients of whom a volume is, under another name, in a later split too.

    Returns:
        What is left, and study, path, error and message of each row that was left out.
    """
    twins = _twins(table)
    last = twins.groupby("twins")[["study", "patient", "split"]].transform("last")
    why: dict[str, str] = {}
    for row, kept in zip(twins.to_dict("records"), last.to_dict("records"), strict=True):
        if row["split"] != kept["split"]:
            why[row["patient"]] = (
                f"patient {row['patient']} has a volume ({row['study']}) equal to {kept['study']} of patient "
                f"{kept['patient']} in the split {kept['split']}: all of this patient is left out, or the test would "
                "measure memory. Give both the same patient, or get the right file"
            )
    left = table["patient"].isin(why)
    return table[~left], [
        {"study": row["study"], "path": row.get("path", ""), "error": "Leak", "message": why[row["patient"]]}
        for row in table[left].to_dict("records")
    ]


def _split_rule(table: pd.DataFrame) -> tuple:
    patient = table["patient"].map({name: folded(name) for name in table["patient"].unique()})
    row = first_row(table, patient)
    first = table["split"].groupby(patient).transform("first")
    other = table["patient"].groupby(patient).transform("first")
    there = row + (", there " + other.map(ascii)).where(other != table["patient"], "")
    why = (
        "); all scans of a patient belong into one, or the test measures memory. If they are two people, give them "
        "names that differ in more than case, accents, blanks, leading zeros or letters that look alike"
    )
    expected = first + ": patient " + table["patient"].map(ascii) + " is in two splits (see row " + there + why
    return "split", first != table["split"], expected


def split_table(table: pd.DataFrame) -> pd.DataFrame:
    """Numbers of patients, scans and volumes by hospital and split; ValueError where a patient is in two splits."""
    numbered = table.set_axis(range(2, len(table) + 2))
    refuse_wrong("manifest", numbered, [_split_rule(numbered)])
    order = pd.Categorical(table["split"], SPLITS, ordered=True)
    scans = table["patient"].astype(str) + "/" + table["scan"].astype(str)
    counted = table.assign(split=order, scans=scans).groupby(["hospital", "split"], observed=True)
    counts = counted.agg(patients=("patient", "nunique"), scans=("scans", "nunique"), volumes=("study", "size"))
    return counts.reset_index().astype({"split": str})


def _is_whole(value: Any) -> bool:
    try:
        return int(value) == float(value) and 0 <= int(value) < 2**53
    except (TypeError, ValueError, OverflowError):
        return False


def load_manifest(path: str | os.PathLike) -> pd.DataFrame:
    """Read and check a manifest. A relative `path` or `masks` in it counts from the manifest's own folder.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a table (see `read_table`), or see `validate_manifest`.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no manifest at {path}; `medctkit manifest` writes the default one")
    table = read_table(path, COLUMNS)
    for name in table.columns.intersection(_NAMES):
        table[name] = table[name].str.strip()
    for name in table.columns.intersection(_NUMBERS):
        table[name] = to_numbers(table[name])
        if name in FINDINGS and str(table[name].dtype) == "Int64":
            table[name] = table[name].astype(float)  # NaN: unknown
    folder = os.path.abspath(path.parent)
    for name in table.columns.intersection(_FILES):
        table[name] = [p and os.path.abspath(os.path.join(folder, os.path.expanduser(p))) for p in table[name]]
    try:
        return validate_manifest(table.reset_index(drop=True), rows=table.index)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def write_manifest(table: pd.DataFrame, path: str | os.PathLike) -> Path:
    """Check a manifest and write it, whole or not at all.

    A `path` or `masks` inside the manifest's folder is written relative to it, so that all can move together.
    """
    path = Path(path).expanduser()
    table = validate_manifest(table).copy()
    folder = Path(os.path.abspath(path.parent))
    for name in table.columns.intersection(_FILES):
        table[name] = ["" if is_empty(file) else _from_folder(str(file), folder) for file in table[name]]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(table, path)
    return path


def _from_folder(file: str, folder: Path) -> str:
    whole = Path(os.path.abspath(os.path.expanduser(file)))
    return whole.relative_to(folder).as_posix() if whole.is_relative_to(folder) else str(whole)


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
            row: dict[str, Any] = dict(study=f"{patient}_{letter}_{reconstruction + 1}", patient=patient, split=split)
            row |= dict(hospital=hospital, seed=seed, scan=letter, reconstruction=reconstruction) | labels
            rows.append(row | dict(report=study.report, checksum=phantom_checksum(study)))
    return rows


def build_default_manifest(patients: Mapping[tuple[str, str], int] | None = None, workers: int | None = None):
    """Generate a phantom cohort's manifest (DataFrame), with so many `patients` of each (hospital, split)."""
    refuse_other_findings("phantoms, of which the default manifest is")
    patients = DEFAULT_PATIENTS if patients is None else patients
    tasks = [(hospital, split, i) for (hospital, split), n in patients.items() for i in range(1, n + 1)]
    with worker_pool(workers or os.cpu_count() or 1) as pool:
        found = list(tqdm(pool.map(_rows_of_patient, tasks, chunksize=8), total=len(tasks), desc="patients"))
    return validate_manifest(pd.DataFrame([row for rows in found for row in rows], columns=list(COLUMNS)))
