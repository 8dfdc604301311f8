"""The manifest: schema, splits by patient, and rows that can be made again."""

from pathlib import Path

import numpy as np
import pytest

from medctkit.findings import FINDINGS, PREVALENCE
from medctkit.manifest import (
    DEFAULT_PATIENTS,
    build_default_manifest,
    load_manifest,
    study_from_row,
    validate_manifest,
    verify_row,
    write_manifest,
)

SHIPPED = Path(__file__).resolve().parent.parent / "data_manifest.csv"


@pytest.fixture(scope="module")
def table():
    return load_manifest(SHIPPED)


def test_the_shipped_cohort_is_the_default_one(table):
    patients = table.groupby(["hospital", "split"])["patient"].nunique().to_dict()
    assert patients == DEFAULT_PATIENTS
    assert (table[(table["hospital"] == "target") & (table["split"] == "train")].shape[0]) >= 600
    assert table.groupby("patient")["split"].nunique().max() == 1
    assert table.groupby("patient").size().max() > 2  # several scans, several reconstructions


def test_rows_can_be_made_again_byte_for_byte(table):
    for _, row in table.sample(12, random_state=0).iterrows():
        verify_row(row)


def test_reconstructions_share_report_and_labels(table):
    for _, scan in table.groupby(["patient", "scan"]):
        assert scan["report"].nunique() == 1 and len(scan[list(FINDINGS)].drop_duplicates()) == 1


def test_prevalences_are_near_those_of_ct_rate(table):
    share = table.drop_duplicates(["patient", "scan"])[list(FINDINGS)].mean()
    for name in FINDINGS:
        assert abs(share[name] - PREVALENCE[name]) < 0.06, name


def test_a_small_cohort_is_the_same_however_many_workers(table, tmp_path):
    small = build_default_manifest({("target", "valid"): 3}, workers=1)
    expected = table[table["patient"].isin(small["patient"])].reset_index(drop=True)
    assert small.equals(expected[small.columns.tolist()])
    again = load_manifest(write_manifest(small, tmp_path / "m.csv"))
    assert again["checksum"].tolist() == small["checksum"].tolist()
    assert not list(tmp_path.glob("*.tmp"))


def test_names_that_look_like_numbers_stay_as_they_are(table, tmp_path):
    numbered = table.head(2).assign(study=["01", "02"], patient=["007", "008"], path=["001.nii.gz", "2"])
    again = load_manifest(write_manifest(numbered, tmp_path / "m.csv"))
    assert again[["study", "patient", "path"]].equals(numbered[["study", "patient", "path"]])


def test_a_row_at_another_resolution_is_the_same_study(table):
    row = table.iloc[3]
    study = study_from_row(row, shape=(16, 32, 32))
    assert study.volume.hu.shape == (16, 32, 32) and study.report == row["report"]


def change(table, column, value, row=4):
    broken = table.copy()
    broken[column] = broken[column].astype(object)
    broken.loc[broken.index[row], column] = value
    return broken


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("split", "exam"),
        ("hospital", "mars"),
        ("seed", -3),
        ("seed", "x"),
        ("seed", 1.5),
        ("reconstruction", None),
        ("report", ""),
        ("report", np.nan),
        ("checksum", "abc"),
        ("Emphysema", 2),
        ("Lung nodule", np.nan),
        ("study", None),
        ("patient", None),
    ],
)
def test_a_wrong_value_is_named_with_row_and_column(table, column, value):
    with pytest.raises(ValueError, match=rf"manifest row 6, column '{column}'"):
        validate_manifest(change(table, column, value))


def test_other_defects_are_refused(table, tmp_path):
    with pytest.raises(ValueError, match=r"lacks the column\(s\) \['report'\]"):
        validate_manifest(table.drop(columns="report"))
    with pytest.raises(ValueError, match="no rows"):
        validate_manifest(table.iloc[:0])
    twice = change(table, "study", table["study"].iloc[0])
    with pytest.raises(ValueError, match="a name that occurs once"):
        validate_manifest(twice)
    elsewhere = table.loc[table["split"] != table["split"].iloc[4], "patient"].iloc[0]
    crossed = change(table, "patient", elsewhere)
    with pytest.raises(ValueError, match="is in the splits"):
        validate_manifest(crossed)
    with pytest.raises(FileNotFoundError, match="no manifest at"):
        load_manifest(tmp_path / "none.csv")
    (tmp_path / "junk.csv").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ValueError, match="junk.csv"):
        load_manifest(tmp_path / "junk.csv")
    wrong = table.iloc[0].copy()
    wrong["seed"] += 1
    with pytest.raises(ValueError, match="made again it has checksum"):
        verify_row(wrong)
