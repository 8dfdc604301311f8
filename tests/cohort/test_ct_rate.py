"""CT-RATE's folder: names, versions, tables, and the manifest made from them."""

import csv
import os
import re
import shutil

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from ct_rate_imitation import PATIENTS, names_of, row_of, write_ct_rate, write_tables, write_volume

from medctkit.cohort.ct_rate import (
    TABLES,
    _reading_columns,
    _stored_as,
    manifest_from_ct_rate,
    parse_volume_name,
    volume_path,
)
from medctkit.cohort.manifest import load_manifest, split_table, volume_from_row, write_manifest
from medctkit.findings import FINDINGS
from medctkit.scans.volumes import read_volume

KEPT = ["train_1_a_1", "train_1_a_2", "train_1_b_1", "train_2_a_1", "valid_1_a_1", "valid_1_a_2", "valid_2_a_1"]


@pytest.fixture(scope="module")
def imitation(tmp_path_factory):
    """(root, name -> phantom): both versions; tests only read it."""
    root = tmp_path_factory.mktemp("ct-rate")
    return root, write_ct_rate(root)


@pytest.fixture
def root(imitation, tmp_path):
    """A copy to change: volumes as links, tables as files."""
    for file in imitation[0].rglob("*.*"):
        copy = tmp_path / file.relative_to(imitation[0])
        copy.parent.mkdir(parents=True, exist_ok=True)
        if file.name.endswith(".nii.gz"):
            copy.symlink_to(file)
        else:
            shutil.copy(file, copy)
    return tmp_path


def table_file(root, split, kind):
    return root / TABLES[split][kind]


def read(file):
    with open(file, newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def write(file, rows):
    with open(file, "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def change(root, split, kind, row, **cells):
    """Replace cells of a table; `row` as in the file, the header being 1."""
    rows = read(table_file(root, split, kind))
    rows[row - 2] |= cells
    write(table_file(root, split, kind), rows)


def row_in(root, name, version=None):
    """The row of a volume in the manifest made of a folder."""
    return manifest_from_ct_rate(root, version)[0].set_index("study").loc[name]


def volume_in(root, name, version):
    return volume_from_row(row_in(root, name, version))


# --- names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".nii.gz"])
def test_names_say_split_patient_scan_and_reconstruction(suffix):
    assert parse_volume_name(f"train_1_a_1{suffix}") == ("train", "train_1", "a", 1)
    assert parse_volume_name(f"valid_1304_c_12{suffix}") == ("valid", "valid_1304", "c", 12)
    assert parse_volume_name("valid_1_a_1").patient != parse_volume_name("train_1_a_1").patient, "two people"
    assert volume_path(f"train_1_a_2{suffix}", 1) == "dataset/train/train_1/train_1_a/train_1_a_2.nii.gz"
    assert volume_path(f"valid_10_b_1{suffix}", 2) == "dataset/valid_fixed/valid_10/valid_10_b/valid_10_b_1.nii.gz"


@pytest.mark.parametrize(
    "name",
    "train_1_a train_1_a_1.nii test_1_a_1 train_01_a_1 train_1_A_1 train_1_a_0 validation_1_a_1 ../train_1_a_1".split()
    + ["train_1_a_1\n", "train_\u0661_a_1", "", None],
)
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match=r"is not the name of a CT-RATE volume; expected .* train_1_a_1\.nii\.gz"):
        parse_volume_name(name)


def test_a_version_that_there_is_not_is_refused(imitation):
    for version in (3, "2"):
        with pytest.raises(ValueError, match=f"version={version!r}: CT-RATE has the versions 1 and 2"):
            manifest_from_ct_rate(imitation[0], version)


# --- one volume ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["train_1_a_1", "train_1_a_2"], ids=["intercept -1024", "intercept -8192"])
def test_both_versions_give_the_same_hu_and_spacing(imitation, name):
    root, studies = imitation
    plain = read_volume(root / volume_path(name, 2))
    for volume in (volume_in(root, name, 1), volume_in(root, name, 2), plain):
        assert np.array_equal(volume.hu, studies[name].volume.hu)
        assert volume.spacing == (13.333333, 7.5, 7.5) and volume.orientation == "SPL"


def test_version_1_lies_as_version_2_does_whatever_its_header_says(root):
    path, expected = root / volume_path("train_1_a_1", 1), volume_in(root, "train_1_a_1", 2)
    for axes in ((1, 1, 1), (-1, 1, 1), (1, -1, -1)):  # what programs write that know no better
        nib.save(nib.Nifti1Image(nib.load(path).get_fdata().astype(np.int16), np.diag([*axes, 1])), path)
        found = volume_in(root, "train_1_a_1", 1)
        assert np.array_equal(found.hu, expected.hu) and found.orientation == expected.orientation


@pytest.mark.parametrize(
    ("directions", "lies"),
    [("[1, 0, 0, 0, 1, 0]", "SPL"), ("[-1.0, 0, 0, 0, -1.0, 0]", "SAR"), ("[1, 0.01, 0, -0.01, 1, 0]", "SPL")]
    + [("", "SPL"), ("[0, 1, 0, 0, 0, -1]", "RIP"), ("[0, 0, 0, 0, 0, 0]", ""), ("[1, 0, 0]", ""), ("no", "")],
)
def test_version_1_lies_as_its_slices_did(directions, lies):
    assert _stored_as(directions) == lies


@pytest.mark.parametrize("spacing", ["[0.7, 0.8]", "['0.7','0.8']"])
def test_spacing_is_slices_then_rows_then_columns(root, spacing):
    change(root, "train", "metadata", 2, XYSpacing=spacing, ZSpacing=1.5)
    row = row_in(root, "train_1_a_1", 1)
    assert (row["spacing_d"], row["spacing_h"], row["spacing_w"]) == (1.5, 0.7, 0.8)
    assert (row["rescale_slope"], row["rescale_intercept"], row["stored_as"]) == (1, -1024, "SPL")


def test_a_malformed_spacing_is_found():
    wrong = "0.7 [0.7] [0.7,0.7,1] [0.7;0.7] [0.7,x] [0,0.7] [0.7,99] [1e999,1] [0.7,-0.7] [0.7,0.7]]".split()
    good = dict(RescaleSlope="1", RescaleIntercept="0", ZSpacing="1")
    _, rules = _reading_columns(pd.DataFrame([good | {"XYSpacing": value} for value in ["[0.7,0.8]", "", *wrong]]))
    found = {column: unfit.tolist() for column, unfit, _ in rules}
    assert found.pop("XYSpacing") == [False, *[True] * 11] and not any(map(any, found.values()))


# --- the manifest -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [None, 1, 2])
def test_the_manifest_joins_what_belongs_together(imitation, version):
    root, studies = imitation
    table, counts = manifest_from_ct_rate(root, version)
    assert table["study"].tolist() == KEPT
    assert table["hospital"].eq("CT-RATE").all() and table["checksum"].eq("").all() and table["seed"].isna().all()
    for row in table.to_dict("records"):
        study = studies[row["study"]]
        assert {name: row[name] for name in FINDINGS} == study.labels
        if row["study"] != "valid_2_a_1":
            assert row["report"] == study.report
        assert row["path"] == str(root / volume_path(row["study"], version or 2))
    assert table["ct_rate_version"].eq(version or 2).all()
    first = table.iloc[0]
    assert (first["patient"], first["scan"], first["reconstruction"]) == ("train_1", "a", 1)
    assert table["PatientAge"].tolist() == [31, 31, 31, 32, 31, 31, 32] and table["PatientSex"][0] == "M"
    assert table["ConvolutionKernel"].tolist()[:2] == ["soft", "sharp"]
    assert counts == {
        "volumes on disk": 9,
        "rows of the tables without a file": 0,
        "dropped: not a chest": 1,
        "dropped: no row in the labels table": 0,
        "dropped: no row in the reports table": 0,
        "dropped: no row in the metadata table": 0,
        "dropped: report not given": 1,
        "kept: volumes": 7,
        "kept: scans": 5,
        "kept: patients": 4,
        "kept: patients in train": 1,
        "kept: patients in valid": 1,
        "kept: patients in test": 2,
        "kept: volumes of version 1": 7 if version == 1 else 0,
        "kept: volumes of version 2": 0 if version == 1 else 7,
    }


@pytest.mark.parametrize("version", [1, 2])
def test_rows_of_the_written_manifest_read_as_the_folder_does(root, version):
    table, _ = manifest_from_ct_rate(root, version)
    assert table[["rescale_slope", "spacing_d"]].notna().all(axis=None) == (version == 1)
    loaded = load_manifest(write_manifest(table, root / "manifest.csv"))
    assert pd.read_csv(root / "manifest.csv")["path"][0] == volume_path("train_1_a_1", version)
    for row in (loaded.iloc[1], loaded.iloc[6]):
        expected = volume_in(root, row["study"], version)
        volume = volume_from_row(row)
        assert np.array_equal(volume.hu, expected.hu) and volume.spacing == expected.spacing
    assert split_table(loaded)["patients"].sum() == 4


def test_a_report_that_says_nothing_falls_back_to_the_impressions_or_goes(root):
    table, _ = manifest_from_ct_rate(root)
    reports = table.set_index("study")["report"]
    assert reports["valid_2_a_1"] == "Invented impression,\nof valid_2_a."
    assert "train_4_a_1" not in reports
    change(root, "valid", "reports", 4, Findings_EN=" not given ", Impressions_EN="NOT GIVEN.")  # however it is written
    table, counts = manifest_from_ct_rate(root)
    assert "valid_2_a_1" not in table["study"].tolist() and counts["dropped: report not given"] == 2


def test_one_reconstruction_is_the_lowest_chest_on_disk(root):
    table, counts = manifest_from_ct_rate(root, one_reconstruction=True)
    assert table["study"].tolist() == [name for name in KEPT if name.endswith("_1")]
    assert counts["dropped: another reconstruction is kept"] == 2
    for version in (1, 2):
        (root / volume_path("train_1_a_1", version)).unlink()
    with open(table_file(root, "valid", "no_chest"), "a") as file:
        file.write("valid_1_a_1.nii.gz\n")
    table, _ = manifest_from_ct_rate(root, one_reconstruction=True)
    assert table["study"].tolist() == ["train_1_a_2", "train_1_b_1", "train_2_a_1", "valid_1_a_2", "valid_2_a_1"]


def test_each_volume_comes_in_the_version_that_is_there(root):
    (root / volume_path("train_1_a_1", 2)).unlink()
    table, counts = manifest_from_ct_rate(root)
    assert table["ct_rate_version"].tolist() == [1, 2, 2, 2, 2, 2, 2]
    assert table["rescale_slope"].notna().tolist() == [True] + [False] * 6
    assert counts["kept: volumes of version 1"] == 1


def test_everything_on_disk_is_kept_or_dropped_for_a_reason(imitation, root):
    write_volume(root, "train_8_a_1", imitation[1]["train_1_a_1"], 2)  # in no table
    for split, kind, rows in (("train", "labels", [7]), ("valid", "reports", [2]), ("train", "metadata", [2])):
        table = read(table_file(root, split, kind))
        write(table_file(root, split, kind), [row for i, row in enumerate(table, 2) if i not in rows])
    (root / "dataset/train_fixed/train_1/train_1_a/train_2_a_9.nii.gz").touch()  # in the folder of another
    (root / "dataset/train_fixed/train_1/scan.nii.gz").touch()
    (root / "dataset/train_fixed/train_1/notes.txt").touch()
    for name in ("valid_2_a_1", "train_3_a_1"):
        for version in (1, 2):
            (root / volume_path(name, version)).unlink()
    table, counts = manifest_from_ct_rate(root)
    assert table["study"].tolist() == ["train_1_a_1", "train_1_a_2", "train_1_b_1", "train_2_a_1", "valid_1_a_2"]
    assert counts["ignored: files whose name or folder is not CT-RATE's"] == 2
    assert counts["rows of the tables without a file"] == 2
    assert counts["dropped: no row in the labels table"] == 2, "train_8, and train_4 whose row went"
    assert counts["dropped: no row in the reports table"] == 1
    assert counts["dropped: no row in the metadata table"] == 0, "version 2 needs none"
    dropped = sum(n for reason, n in counts.items() if reason.startswith("dropped"))
    assert counts["volumes on disk"] == counts["kept: volumes"] + dropped
    _, counts = manifest_from_ct_rate(root, 1)
    assert counts["dropped: no row in the metadata table"] == 1, "version 1 can't be read without"


def test_folders_behind_links_are_searched_and_none_is_passed_over(root, monkeypatch):
    _, before = manifest_from_ct_rate(root, 2)
    (root / "dataset/train_fixed/train_1").rename(root / "other_disk")
    (root / "dataset/train_fixed/train_1").symlink_to(root / "other_disk")
    (root / "dataset/train_fixed/back").symlink_to(root)
    table, counts = manifest_from_ct_rate(root, 2)
    assert table["study"].tolist() == KEPT and counts == before
    scandir = os.scandir

    def forbidden(folder):
        if str(folder).endswith("train_2"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(PermissionError, match="Permission denied: .*train_2"):
        manifest_from_ct_rate(root, 2)


def test_age_is_read_where_it_is_in_years(root):
    for row, age in enumerate(["036Y", "9Y", "006M", "", "36", "old"], 2):
        change(root, "train", "metadata", row, PatientAge=age)
    table, _ = manifest_from_ct_rate(root)
    ages = table.set_index("study")["PatientAge"]
    assert (ages["train_1_a_1"], ages["train_1_a_2"]) == (36, 9) and ages[["train_1_b_1", "train_2_a_1"]].isna().all()


def test_tables_of_a_split_that_is_not_there_are_not_asked_for(root):
    for folder in ("train", "train_fixed"):
        shutil.rmtree(root / "dataset" / folder)
    for kind in TABLES["train"].values():
        (root / kind).unlink()
    table, _ = manifest_from_ct_rate(root)
    assert set(table["split"]) == {"test"}


# --- splits -------------------------------------------------------------------------------------------------


def write_empty(root, patients, **arguments):
    """Tables with invented rows, and empty files for them."""
    labels = [dict(zip(FINDINGS, map(int, f"{i:018b}"), strict=True)) for i in range(0, 2**18, 131)]
    rows, scan = [], 0
    for name in names_of(patients):
        path = root / volume_path(name, 1)
        if name.endswith("_1"):
            scan += 1
            path.parent.mkdir(parents=True)
        path.touch()
        rows.append(row_of(name, labels[scan % len(labels)], f"Invented report {scan}."))
    write_tables(root, rows, **arguments)
    return root


def test_the_assignment_is_the_same_for_ever(tmp_path):
    """Pinned: a manifest of today and one of next year must agree on who trains and who does not."""
    patients = {f"{split}_{i}": {"a": 1} for split in ("train", "valid") for i in range(1, 101)}
    root = write_empty(tmp_path, patients)

    def drawn(**arguments):
        table, _ = manifest_from_ct_rate(root, **arguments)
        assert set(table.loc[table["patient"].str.startswith("valid"), "split"]) == {"test"}
        return table.loc[table["split"] == "valid", "patient"].tolist()

    assert drawn()[:5] == ["train_2", "train_5", "train_13", "train_16", "train_17"]
    assert drawn(seed=1)[:5] != drawn()[:5]
    assert drawn(valid_share=0) == []
    assert set(drawn()) < set(drawn(valid_share=0.2)), "a larger share keeps who was drawn"


def test_adding_patients_moves_nobody(root):
    before, _ = manifest_from_ct_rate(root, 2, valid_share=0.5)
    for name in names_of({f"train_{i}": {"a": 1} for i in range(20, 40)}):
        for kind, row in row_of(name, dict.fromkeys(FINDINGS, 0), "An invented report.").items():
            file = table_file(root, "train", kind)
            write(file, [row, *read(file)])
        path = root / volume_path(name, 2)
        path.parent.mkdir(parents=True)
        path.touch()
    after, _ = manifest_from_ct_rate(root, 2, valid_share=0.5)
    assert len(after) == len(before) + 20 and set(after["split"]) == {"train", "valid", "test"}
    moved = before.merge(after, on="study")
    assert len(moved) == len(before) and (moved["split_x"] == moved["split_y"]).all()


# --- malformed tables -----------------------------------------------------------------------------------


def without(column, into=None):
    """Drop or rename a column."""
    return lambda rows: [{into if k == column else k: v for k, v in row.items() if into or k != column} for row in rows]


def cell(row, column, value):
    return lambda rows: [*rows[: row - 2], rows[row - 2] | {column: value}, *rows[row - 1 :]]


def row_with_the_other_label(rows):
    return cell(3, "Emphysema", str(1 - int(rows[0]["Emphysema"])))(rows)


# table, what is done to it, and what the message says of the place, the value and the way out
MALFORMED = {
    "no volume name": ("labels", without("VolumeName"), r"lacks the column\(s\) \['VolumeName'\]"),
    "a label misspelt": ("labels", without("Emphysema", "Emphisema"), "'Emphisema' may be meant for 'Emphysema'"),
    "a label of 2": ("labels", cell(3, "Atelectasis", "2"), "row 3, column 'Atelectasis': got 2, expected 0 or 1"),
    "other labels": ("labels", row_with_the_other_label, r"row 3, column 'Emphysema': got \d, .* one value .* row 2"),
    "a volume twice": ("labels", cell(4, "VolumeName", "train_1_a_1"), "row 4, .*'train_1_a_1', .* one row .* row 2"),
    "another split": ("labels", cell(4, "VolumeName", "valid_1_a_1.nii.gz"), "row 4, .*'valid_1_a_1', .* train_1_a_1"),
    "no reconstruction": ("reports", cell(2, "VolumeName", "train_1_a"), "row 2, column 'VolumeName': got 'train_1_a'"),
    "other reports": ("reports", cell(3, "Findings_EN", "New."), r"row 3, column 'Findings_EN': got 'New\.', .* row 2"),
    "no slopes": ("metadata", without("RescaleSlope"), r"lacks the column\(s\) \['RescaleSlope'\]"),
    "a slope of 0": ("metadata", cell(2, "RescaleSlope", "0"), "row 2, column 'RescaleSlope': got '0', .*above 0"),
    "a slope left out": ("metadata", cell(2, "RescaleSlope", ""), "row 2, column 'RescaleSlope': got '', expected"),
    "an intercept in words": ("metadata", cell(3, "RescaleIntercept", "no"), "row 3, .*'no', expected a number"),
    "one or a thousand": ("metadata", cell(3, "RescaleIntercept", "-1,024"), "row 3, .*'-1,024', expected a number"),
    "slices of 0 mm": ("metadata", cell(4, "ZSpacing", "0"), "row 4, column 'ZSpacing': got '0', expected a len"),
    "one pixel spacing": ("metadata", cell(4, "XYSpacing", "[0.7]"), r"row 4, .*'\[0\.7\]', .*0\.05 to 20\.0 mm"),
}


@pytest.mark.parametrize(("kind", "broken", "message"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_row_is_listed_and_left_out_a_malformed_table_refused(root, kind, broken, message):
    file, failures = table_file(root, "train", kind), []
    write(file, broken(read(file)))
    if message.startswith(("lacks", "'")):
        with pytest.raises(ValueError, match=message) as caught:
            manifest_from_ct_rate(root, 1)
        assert str(caught.value).startswith(str(file))
        return
    table, counts = manifest_from_ct_rate(root, 1, failures=failures)
    assert any(re.search(message, failure["message"]) for failure in failures)
    assert all(failure["path"] == str(file) and failure["message"].startswith(str(file)) for failure in failures)
    left = set(KEPT) - set(table["study"])
    assert left and left <= {"train_1_a_1", "train_1_a_2", "train_1_b_1"}
    assert counts[f"dropped: no row in the {kind} table"] >= len(left)


def test_equal_rows_count_once_and_torn_rows_not_at_all(root):
    expected, _ = manifest_from_ct_rate(root, 1)
    for kind in ("labels", "reports", "metadata"):
        rows = read(table_file(root, "train", kind))
        write(table_file(root, "train", kind), [*rows, rows[0]])
        with open(table_file(root, "train", kind), "ab") as file:
            file.write(b'train_9_a_1.nii.gz,"1"\n')
    failures = []
    pd.testing.assert_frame_equal(manifest_from_ct_rate(root, 1, failures=failures)[0], expected)
    assert len(failures) == 3 and all("row 9 has 2 cells, the header" in failure["message"] for failure in failures)


def test_where_every_row_is_wrong_that_is_refused(root):
    for split in TABLES:
        rows = read(table_file(root, split, "labels"))
        write(table_file(root, split, "labels"), [row | {"Emphysema": "yes"} for row in rows])
    with pytest.raises(ValueError, match=r"none of its volumes can be used(.|\n)*row 2, column 'Emphysema': got 'yes'"):
        manifest_from_ct_rate(root, 1)


@pytest.mark.parametrize("line", ["train_3", "valid_1_a_1.nii.gz", "head ct", "train_3_a_1;train_3_a_2", "\udcff"])
def test_a_line_of_the_list_of_no_chests_that_names_no_volume_is_listed(root, line):
    file, failures = table_file(root, "train", "no_chest"), []
    file.write_bytes(b"train_1_a_2.nii.gz\n\n" + line.encode(errors="surrogateescape") + b"\n")
    table, _ = manifest_from_ct_rate(root, failures=failures)
    (failure,) = failures
    assert re.search(r"no_chest_train\.txt line 3: got .*, expected a volume such as train_1_a_1", failure["message"])
    assert "train_1_a_2" not in set(table["study"])


def test_the_list_of_no_chests_may_give_paths_or_bare_names(root):
    file = table_file(root, "train", "no_chest")
    file.write_text("dataset/train/train_1/train_1_a/train_1_a_2.nii.gz\n train_2_a_1 \r\n")
    table, counts = manifest_from_ct_rate(root)
    assert counts["dropped: not a chest"] == 2 and not {"train_1_a_2", "train_2_a_1"} & set(table["study"])


@pytest.mark.parametrize("kind", ["labels", "reports", "metadata", "no_chest"])
def test_a_missing_table_is_named(root, kind):
    table_file(root, "valid", kind).unlink()
    with pytest.raises(FileNotFoundError, match=f"{TABLES['valid'][kind]}.*is missing; download it as well"):
        manifest_from_ct_rate(root)


def test_no_volumes_says_what_was_looked_for_and_where(root, tmp_path):
    for wrong in (root / "dataset", root / "nowhere"):
        looked = rf"{wrong}: no volume of CT-RATE in dataset/\*/ or dataset/\*_fixed/ "
        volume = r"\(a volume is dataset/train_fixed/train_1/train_1_a/train_1_a_1\.nii\.gz\)"
        with pytest.raises(FileNotFoundError, match=f"{looked}{volume}; give the folder that holds `dataset`"):
            manifest_from_ct_rate(wrong)
    with open(table_file(root, "train", "no_chest"), "w") as file:
        file.writelines(f"{name}\n" for name in names_of(PATIENTS) if name.startswith("train"))
    for folder in ("valid", "valid_fixed"):
        shutil.rmtree(root / "dataset" / folder)
    with pytest.raises(ValueError, match="none of its volumes can be used: .*'dropped: not a chest': 6"):
        manifest_from_ct_rate(root)


@pytest.mark.parametrize("share", [-0.1, 1, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(imitation, share):
    with pytest.raises(ValueError, match="valid_share=.*expected a share of patients, from 0 to below 1"):
        manifest_from_ct_rate(imitation[0], valid_share=share)
