"""CT-RATE's folder: names of volumes, its two versions, its tables, and the manifest made from them.

The data set (arXiv 2403.17834) sets four traps. `train_1` and `valid_1` are two patients. Its second split is
`valid_` in some file names and `validation_` in others. Some volumes show no chest. And version 1 holds stored
values that the metadata turn into HU, while version 2 (`train_fixed`, `valid_fixed`) is in HU with its true
geometry: the metadata applied to it once more shift every voxel by -1024 or -8192.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from itertools import product
from math import inf
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from medctkit.cohort.manifest import COLUMNS, READING, SPLITS, validate_manifest
from medctkit.common.csv_tables import first_row, read_table, to_numbers, wrong_cells
from medctkit.common.text import listed
from medctkit.findings import FINDINGS
from medctkit.scans.geometry import CANONICAL, STEP_RANGE, nearest_orientation, ras_affine
from medctkit.scans.stored import files_below

HOSPITAL = "CT-RATE"
VERSIONS = {1: "dataset/{split}", 2: "dataset/{split}_fixed"}
TABLES = {
    split: {
        "labels": f"dataset/multi_abnormality_labels/{split}_predicted_labels.csv",
        "reports": f"dataset/radiology_text_reports/{long}_reports.csv",
        "metadata": f"dataset/metadata/{long}_metadata.csv",
        "no_chest": f"dataset/metadata/no_chest_{split}.txt",
    }
    for split, long in (("train", "train"), ("valid", "validation"))
}
REPORT = ("Findings_EN", "Impressions_EN")  # of the report table; the second where the first says nothing
KEPT = ("Manufacturer", "ConvolutionKernel", "PatientSex", "PatientAge")  # of the metadata, where it has them
_DIRECTIONS = "ImageOrientationPatient"
_GEOMETRY = ("RescaleSlope", "RescaleIntercept", "XYSpacing", "ZSpacing")
_NAME = re.compile(r"(?P<patient>(?P<split>train|valid)_[1-9][0-9]*)_(?P<scan>[a-z]+)_(?P<reconstruction>[1-9][0-9]*)")
_PLACEHOLDER = r"(?i:\s*(?:not given\.?)?\s*)"
_LENGTH = r"\s*'?([0-9.eE+-]+)'?\s*"


class VolumeName(NamedTuple):
    """What the name of a CT-RATE volume says, as in `train_1_a_2.nii.gz`."""

    split: str
    patient: str
    scan: str
    reconstruction: int


def parse_volume_name(name: str) -> VolumeName:
    """Split, patient ("train_1": with the split, as numbers begin anew in each), scan and reconstruction.

    Raises:
        ValueError: not a name of CT-RATE, with or without .nii.gz.
    """
    found = _NAME.fullmatch(str(name).removesuffix(".nii.gz"))
    if not found:
        raise ValueError(
            f"{name!r} is not the name of a CT-RATE volume; expected split, patient, scan and reconstruction as in "
            "train_1_a_1.nii.gz"
        )
    return VolumeName(found["split"], found["patient"], found["scan"], int(found["reconstruction"]))


def volume_path(name: str, version: int) -> str:
    """Where a volume lies: `dataset/train/train_1/train_1_a/train_1_a_1.nii.gz`, with `train_fixed` for version 2."""
    split, patient, scan, reconstruction = parse_volume_name(name)
    folder = VERSIONS[_checked_version(version)].format(split=split)
    return f"{folder}/{patient}/{patient}_{scan}/{patient}_{scan}_{reconstruction}.nii.gz"


def manifest_from_ct_rate(
    root: str | os.PathLike,
    version: int | None = None,
    valid_share: float = 0.1,
    seed: int = 0,
    one_reconstruction: bool = False,
    failures: list[dict] | None = None,
) -> tuple[pd.DataFrame, dict[str, int]]:
    """Make a manifest of the volumes of CT-RATE that are on disk, chests with a report and labels.

    Rows of the tables that are wrong are left out, and with them their volumes; rows that are there twice, the same,
    count once.

    CT-RATE's validation patients become the split "test"; a share of its training patients becomes "valid".
    Whether a patient does depends on the seed and the patient's name alone, so that no patient ever moves when
    others are added.

    Args:
        root: the folder that holds `dataset`.
        version: 1 or 2; None: for each volume the one that is there, 2 if both are.
        valid_share: share of the training patients that becomes "valid", from 0 to below 1.
        seed: draws them.
        one_reconstruction: keep of each scan only the reconstruction with the lowest number.
        failures: gets study, path (of the table), error and message of each row that is wrong.

    Returns:
        The manifest, and counts of what was found, dropped (by reason) and kept.

    Raises:
        FileNotFoundError: no volumes, or a table is missing.
        ValueError: tables without the columns they need, or nothing left (names table, row and column).
    """
    if not 0 <= valid_share < 1:
        raise ValueError(f"valid_share={valid_share}: expected a share of patients, from 0 to below 1")
    root = Path(root).expanduser()
    counts: Counter[str] = Counter()
    wrong = [] if failures is None else failures
    volumes = _volumes_on_disk(root, version, counts)
    parts = [_joined(root, split, part, counts, wrong) for split, part in volumes.groupby("split")]
    table = pd.concat(parts, ignore_index=True)
    if one_reconstruction:
        table = _without(table, table.duplicated(["patient", "scan"]), "another reconstruction is kept", counts)
    if not len(table):
        why = listed(row["message"] for row in wrong)
        raise ValueError(f"{root}: none of its volumes can be used: {dict(counts)}\n{why}".rstrip())
    training = table["split"] == "train"
    drawn = {name for name in table.loc[training, "patient"].unique() if _draw(seed, name) < valid_share}
    table["split"] = table["split"].map({"train": "train", "valid": "test"}).mask(table["patient"].isin(drawn), "valid")
    counts["kept: volumes"] = len(table)
    counts["kept: scans"] = len(table[["patient", "scan"]].drop_duplicates())
    counts["kept: patients"] = table["patient"].nunique()
    for split in SPLITS:
        counts[f"kept: patients in {split}"] = table.loc[table["split"] == split, "patient"].nunique()
    for number in VERSIONS:
        counts[f"kept: volumes of version {number}"] = int((table["ct_rate_version"] == number).sum())
    return validate_manifest(table), dict(counts)


def _checked_version(version: int) -> int:
    if version not in VERSIONS:
        raise ValueError(f"version={version!r}: CT-RATE has the versions {' and '.join(map(str, VERSIONS))}")
    return version


def _draw(seed: int, patient: str) -> float:
    """A number from 0 to below 1 that depends on nothing else."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{patient}".encode()).digest()[:6]) / 2**48


def _without(table: pd.DataFrame, dropped: pd.Series, reason: str, counts: Counter) -> pd.DataFrame:
    counts[f"dropped: {reason}"] += int(dropped.sum())
    return table[~dropped]


def _volumes_on_disk(root: Path, version: int | None, counts: Counter) -> pd.DataFrame:
    """Columns of the manifest that names and folders give, in the order of patients, scans, reconstructions."""
    versions = tuple(VERSIONS) if version is None else (_checked_version(version),)
    found: dict[VolumeName, tuple[int, str]] = {}
    for number, split in product(versions, TABLES):
        top = os.path.abspath(root / VERSIONS[number].format(split=split))
        if not os.path.isdir(top):
            continue
        for file in files_below(top):
            name = file.name.removesuffix(".nii.gz")
            if name == file.name:
                continue
            if _NAME.fullmatch(name) and str(file) == os.path.abspath(root / volume_path(name, number)):
                found[parse_volume_name(name)] = number, str(file)  # the later version wins
            else:
                counts["ignored: files whose name or folder is not CT-RATE's"] += 1
    counts["volumes on disk"] = len(found)
    if not found:
        looked = " or ".join(f"{folder.format(split='*')}/" for n, folder in VERSIONS.items() if n in versions)
        raise FileNotFoundError(
            f"{root}: no volume of CT-RATE in {looked} (a volume is {volume_path('train_1_a_1', versions[-1])}); "
            "give the folder that holds `dataset`"
        )
    order = sorted(found, key=lambda name: (name.split, int(name.patient.split("_")[1]), name))
    table = pd.DataFrame(order, columns=VolumeName._fields)
    table["study"] = [f"{name.patient}_{name.scan}_{name.reconstruction}" for name in order]
    table["ct_rate_version"] = [found[name][0] for name in order]
    table["path"] = [found[name][1] for name in order]
    return table.assign(hospital=HOSPITAL)


def _joined(root: Path, split: str, volumes: pd.DataFrame, counts: Counter, wrong: list[dict]) -> pd.DataFrame:
    """Rows of the manifest for the volumes of one of CT-RATE's splits; `split` is still CT-RATE's."""
    tables = {
        "labels": _read_table(root, split, "labels", wrong, FINDINGS),
        "reports": _read_table(root, split, "reports", wrong, REPORT),
        "metadata": _read_table(root, split, "metadata", wrong, _GEOMETRY, (*KEPT, _DIRECTIONS)),
    }
    listed_somewhere = set().union(*(table["VolumeName"] for table in tables.values()))
    counts["rows of the tables without a file"] += len(listed_somewhere - set(volumes["study"]))
    volumes = _without(volumes, volumes["study"].isin(_no_chest(root, split, wrong)), "not a chest", counts)

    labels, reports, metadata = (table[table["VolumeName"].isin(volumes["study"])] for table in tables.values())
    labels = labels.assign(**{name: to_numbers(labels[name]) for name in FINDINGS})
    rules = [(name, ~labels[name].isin((0, 1)), "0 or 1") for name in FINDINGS]
    labels = _right(root, split, "labels", labels, [*rules, *_one_value_for_each_scan(labels, FINDINGS)], wrong)
    reports = _right(root, split, "reports", reports, _one_value_for_each_scan(reports, REPORT[:1]), wrong)
    stored = metadata["VolumeName"].isin(volumes.loc[volumes["ct_rate_version"] == 1, "study"])
    reading, rules = _reading_columns(metadata)
    rules = [(name, unfit & stored, expected) for name, unfit, expected in rules]
    metadata = _right(root, split, "metadata", metadata, rules, wrong)
    for kind, table, needed in (("labels", labels, (1, 2)), ("reports", reports, (1, 2)), ("metadata", metadata, (1,))):
        lacking = ~volumes["study"].isin(table["VolumeName"]) & volumes["ct_rate_version"].isin(needed)
        volumes = _without(volumes, lacking, f"no row in the {kind} table", counts)
    report = _report_texts(reports).set_axis(reports["VolumeName"])
    empty = report.reindex(volumes["study"]).eq("").set_axis(volumes.index)
    volumes = _without(volumes, empty, "report not given", counts)

    names = pd.Index(volumes["study"])
    reading, extra = reading[stored].reindex(metadata.index), _extra_columns(metadata)

    def joined(table: pd.DataFrame, keys: pd.Series) -> pd.DataFrame:
        return table.set_axis(keys).reindex(names).set_axis(volumes.index)

    parts = [
        volumes.assign(report=report.reindex(names).to_numpy(), seed=pd.array([pd.NA] * len(names), "Int64")),
        joined(labels[list(FINDINGS)], labels["VolumeName"]).astype("int64"),
        joined(reading, metadata["VolumeName"]),
        joined(extra, metadata["VolumeName"]),
    ]
    table = pd.concat(parts, axis=1).assign(checksum="")
    return table[[*COLUMNS, "path", *READING[:5], "stored_as", "ct_rate_version", *extra.columns]]


def _right(
    root: Path, split: str, kind: str, table: pd.DataFrame, rules: Sequence[tuple], wrong: list[dict]
) -> pd.DataFrame:
    """The rows of a table that no rule finds wrong; what is wrong with the others goes into `wrong`."""
    path = str(root / TABLES[split][kind])
    why = dict(reversed(wrong_cells(path, table, rules)))  # of each row the first
    for at, message in sorted(why.items()):
        study = table["VolumeName"].iloc[at]
        wrong.append({"study": study, "path": path, "error": "ValueError", "message": message})
    return table.drop(index=table.index[list(why)])


def _extra_columns(metadata: pd.DataFrame) -> pd.DataFrame:
    """What is worth keeping of the metadata; the age in years, missing where it isn't written as "036Y"."""
    extra = metadata[[name for name in KEPT if name in metadata]]
    if "PatientAge" in extra:
        years = extra["PatientAge"].str.extract(r"^\s*([0-9]{1,3})Y\s*$", expand=False)
        extra = extra.assign(PatientAge=pd.to_numeric(years).astype("Int64"))
    return extra


def _read_table(
    root: Path, split: str, kind: str, wrong: list[dict], columns: Sequence[str], optional: Sequence[str] = ()
) -> pd.DataFrame:
    """A table of CT-RATE with VolumeName checked and without its .nii.gz; the index is the row in the file."""
    path = root / TABLES[split][kind]
    if not path.is_file():
        raise FileNotFoundError(f"{path}: this table of CT-RATE is missing; download it as well")
    broken: dict[int, str] = {}
    table = read_table(path, ("VolumeName", *columns), optional, broken)
    wrong += [{"study": "", "path": str(path), "error": "ValueError", "message": m} for m in broken.values()]
    table["VolumeName"] = table["VolumeName"].str.strip().str.removesuffix(".nii.gz")
    table = table.drop_duplicates()
    name = table["VolumeName"]
    named = name.str.fullmatch(_NAME.pattern) & name.str.startswith(f"{split}_")
    others = "one row for each volume: others are about this one too, see row " + first_row(table, name)
    rules = [
        ("VolumeName", ~named.astype(bool), f"a volume of this split, such as {split}_1_a_1.nii.gz"),
        ("VolumeName", name.duplicated(keep=False), others),
    ]
    return _right(root, split, kind, table, rules, wrong)


def _no_chest(root: Path, split: str, wrong: list[dict]) -> set[str]:
    """Names of the volumes that CT-RATE lists as no chests, without .nii.gz."""
    path = root / TABLES[split]["no_chest"]
    if not path.is_file():
        raise FileNotFoundError(f"{path}: the list of volumes that show no chest is missing; download it as well")
    names = set()
    for number, line in enumerate(path.read_text(encoding="utf-8-sig", errors="replace").splitlines(), 1):
        name = line.strip().rsplit("/")[-1].removesuffix(".nii.gz")
        found = _NAME.fullmatch(name)
        if found and found["split"] == split:
            names.add(name)
        elif name:
            message = f"{path} line {number}: got {line!r}, expected a volume such as {split}_1_a_1.nii.gz"
            wrong.append({"study": name, "path": str(path), "error": "ValueError", "message": message})
    return names


def _report_texts(reports: pd.DataFrame) -> pd.Series:
    """The findings, or the impressions where they say nothing; "" where these say nothing either."""
    findings, impressions = (
        reports[name].str.strip().mask(reports[name].str.fullmatch(_PLACEHOLDER).astype(bool), "") for name in REPORT
    )
    return findings.mask(findings == "", impressions)


def _one_value_for_each_scan(table: pd.DataFrame, columns: Sequence[str]) -> list[tuple]:
    scan = pd.factorize(table["VolumeName"].str.rsplit("_", n=1).str[0])[0]
    expected = "one value for all reconstructions of a scan, which begin in row " + first_row(table, scan)
    return [(name, table[name].groupby(scan).transform("nunique", dropna=False) > 1, expected) for name in columns]


def _stored_as(directions: str) -> str:
    """How an array of version 1 lies, of which its header says nothing true: as the slices, SPL of one who lies supine.

    Args:
        directions: ImageOrientationPatient, those of a row and of a column, in LPS: "[1, 0, 0, 0, 1, 0]", or "".

    Returns:
        Three letters, or "" where the directions are none.
    """
    if not directions.strip():
        return CANONICAL
    try:
        row, column = np.reshape([float(number) for number in directions.strip(" []").split(",")], (2, 3))
        return nearest_orientation(ras_affine(np.stack([np.cross(row, column), column, row], axis=1), (0, 0, 0)))
    except ValueError:
        return ""


def _reading_columns(metadata: pd.DataFrame) -> tuple[pd.DataFrame, list[tuple]]:
    """Columns of the manifest that say how to read version 1, of rows of the metadata, which are text; and rules."""
    plane = metadata["XYSpacing"].str.extract(rf"^\s*\[{_LENGTH},{_LENGTH}\]\s*$")
    values = metadata[["RescaleSlope", "RescaleIntercept", "ZSpacing"]].apply(to_numbers)
    values = values.assign(rows=plane[0], columns=plane[1]).apply(pd.to_numeric, errors="coerce").astype(float)
    low, high = STEP_RANGE
    inside = values[["ZSpacing", "rows", "columns"]].apply(lambda steps: steps.between(low, high))
    between = f"from {low} to {high} mm"
    rules = [
        ("RescaleSlope", ~values["RescaleSlope"].between(0, inf, inclusive="neither"), "a number above 0"),
        ("RescaleIntercept", ~values["RescaleIntercept"].between(-inf, inf, inclusive="neither"), "a number"),
        ("ZSpacing", ~inside["ZSpacing"], f"a length {between}"),
        ("XYSpacing", ~(inside["rows"] & inside["columns"]), f"two lengths {between}, such as [0.7, 0.7]"),
    ]
    columns = values.set_axis(READING[:5], axis=1).assign(stored_as=CANONICAL)
    if _DIRECTIONS in metadata:
        columns["stored_as"] = metadata[_DIRECTIONS].map(_stored_as)
        rules.append((_DIRECTIONS, columns["stored_as"] == "", "two directions, such as [1, 0, 0, 0, 1, 0]"))
    return columns, rules
