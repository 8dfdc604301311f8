"""The manifest: schema, splits by patient, rows that can be made again, and tables as people send them."""

import csv
import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scan_files import chest, write_nifti

from medctkit.cohort.manifest import (
    DEFAULT_PATIENTS,
    READING,
    build_default_manifest,
    load_manifest,
    reading_arguments,
    split_table,
    study_from_row,
    validate_manifest,
    verify_row,
    volume_from_row,
    without_leaks,
    write_manifest,
)
from medctkit.common.csv_tables import read_table
from medctkit.common.text import folded
from medctkit.experiments.tables import write_scores
from medctkit.findings import FINDINGS

SHIPPED = Path(__file__).resolve().parents[2] / "data_manifest.csv"


@pytest.fixture(scope="module")
def table():
    return load_manifest(SHIPPED)


CHOICES = dict.fromkeys(("orientation", "series", "stored_as", "crop", "acquisition", "largest_gap", "resample"), "")


def real_rows(folder="."):
    """Two patients with files and one phantom: patient 007 has two scans, one of them in two reconstructions."""
    rows = []
    for study, patient, split, scan, reconstruction in (
        ("01", "007", "train", "a", 1),
        ("02", "007", "train", "a", 2),
        ("03", "007", "train", "b", 1),
        ("04", "008", "test", "a", 1),
    ):
        row = dict(study=study, patient=patient, split=split, hospital="St Mary's", seed="", scan=scan)
        row |= dict(reconstruction=reconstruction, **dict.fromkeys(FINDINGS, 0), report=f"Report of {patient} {scan}.")
        row |= dict(checksum="", path=f"{folder}/{study}.nii.gz", rescale_slope="", rescale_intercept="")
        rows.append(row | CHOICES | dict(spacing_d="", spacing_h="", spacing_w="", age="60"))
    phantom = pd.read_csv(SHIPPED, dtype=str, nrows=1).to_dict("records")[0]
    return [*rows, dict.fromkeys(rows[0], "") | phantom]


def as_csv(rows, delimiter=",", quoting=csv.QUOTE_MINIMAL):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter, lineterminator="\n", quoting=quoting)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def loaded(tmp_path, content, name="m.csv"):
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return load_manifest(tmp_path / name)


# --- the default cohort ---------------------------------------------------------------------------------


def test_the_shipped_cohort_is_the_default_one(table):
    patients = table.groupby(["hospital", "split"])["patient"].nunique().to_dict()
    assert patients == DEFAULT_PATIENTS
    assert (table[(table["hospital"] == "target") & (table["split"] == "train")].shape[0]) >= 600
    assert table.groupby("patient")["split"].nunique().max() == 1
    assert table.groupby("patient").size().max() > 2  # several scans, several reconstructions


def test_the_shipped_cohort_is_written_byte_for_byte(table, tmp_path):
    assert write_manifest(table, tmp_path / "m.csv").read_bytes() == SHIPPED.read_bytes()


def test_rows_can_be_made_again_byte_for_byte(table):
    for _, row in table.sample(6, random_state=0).iterrows():
        verify_row(row)


@pytest.mark.slow
def test_a_small_cohort_is_the_same_however_many_workers(table, tmp_path):
    small = build_default_manifest({("target", "valid"): 3}, workers=1)
    expected = table[table["patient"].isin(small["patient"])].reset_index(drop=True)
    assert small.equals(expected[small.columns.tolist()])
    again = load_manifest(write_manifest(small, tmp_path / "m.csv"))
    assert again["checksum"].tolist() == small["checksum"].tolist()
    assert not list(tmp_path.glob("*.tmp"))


def test_a_row_at_another_resolution_is_the_same_study(table):
    row = table.iloc[3]
    study = study_from_row(row, shape=(16, 32, 32))
    assert study.volume.hu.shape == (16, 32, 32) and study.report == row["report"]


def test_the_split_table_counts_patients_scans_and_volumes(table):
    counts = split_table(table)
    found = {(row.hospital, row.split): row.patients for row in counts.itertuples()}
    assert found == DEFAULT_PATIENTS
    assert counts["volumes"].sum() == len(table) and (counts["patients"] < counts["scans"]).all()
    assert counts["split"].tolist() == ["test", "train", "valid", "test"], "in the order train, valid, test"
    crossed = change(table, "patient", table["patient"].iloc[-1], row=0)
    with pytest.raises(ValueError, match=r"row 2403, column 'split': got 'test', expected .* is in two splits \(see"):
        split_table(change(crossed, "split", "train", row=0))


# --- real scans ---------------------------------------------------------------------------------------


def test_names_that_look_like_numbers_or_like_nothing_stay_as_they_are(tmp_path):
    rows = real_rows()
    for row in rows[:3]:
        row["patient"] = "NA"
    found = loaded(tmp_path, as_csv(rows))
    assert found["study"].tolist()[:4] == ["01", "02", "03", "04"]
    assert found["patient"].tolist()[:4] == ["NA", "NA", "NA", "008"]
    assert found["age"].tolist() == ["60"] * 4 + [""], "columns that nobody knows are kept"


NAMES = ["1E5", "100000", "007", "1.0", "nan", "NA", "None", "inf", "1e400", "0x10", "TRUE", "-1"]


def test_names_stay_the_text_that_was_written_through_every_table(tmp_path):
    rows = [real_rows()[0] | dict.fromkeys(("study", "patient", "scan", "hospital"), name) for name in NAMES]
    found = loaded(tmp_path, as_csv([row | {"path": f"{i}.nii"} for i, row in enumerate(rows)]))
    write_manifest(found, tmp_path / "again.csv")
    scores = {"base": np.full((len(NAMES), len(FINDINGS)), 0.5)}
    write_scores(tmp_path / "scores.csv", *found[["study", "patient"]].to_numpy().T, scores["base"], scores)
    assert read_table(tmp_path / "scores.csv", ["patient"])["patient"][:: len(FINDINGS)].tolist() == NAMES
    for column in ("study", "patient", "scan", "hospital"):
        assert load_manifest(tmp_path / "again.csv")[column].tolist() == NAMES
        with pytest.raises(ValueError, match=f"column '{column}': got 100000.0, expected text: 007 is not 7"):
            validate_manifest(found.assign(**{column: pd.to_numeric(found[column], errors="coerce")}).iloc[:2])


def test_labels_of_real_scans_may_be_unknown(tmp_path):
    rows = real_rows()
    rows[2]["Emphysema"] = ""
    for row in rows[:4]:
        row["Lung nodule"] = " "
    found = loaded(tmp_path, as_csv(rows))
    assert np.isnan(float(found.to_dict("records")[2]["Emphysema"]))
    assert found["Emphysema"].isna().tolist() == [False, False, True, False, False]
    assert found["Lung nodule"].isna().tolist() == [True] * 4 + [False]
    again = load_manifest(write_manifest(found, tmp_path / "again.csv"))
    assert again[list(FINDINGS)].equals(found[list(FINDINGS)])
    rows[3]["Atelectasis"] = "0.5"
    with pytest.raises(ValueError, match=r"column 'Atelectasis': got 0.5, expected 0 or 1, or nothing for a real scan"):
        loaded(tmp_path, as_csv(rows))


def test_reconstructions_agree_on_what_is_unknown(tmp_path):
    rows = real_rows()
    rows[0]["Emphysema"] = rows[1]["Emphysema"] = ""
    loaded(tmp_path, as_csv(rows))
    for first, second in (("", "1"), ("0", "")):
        rows[0]["Emphysema"], rows[1]["Emphysema"] = first, second
        with pytest.raises(ValueError, match="row 3, column 'Emphysema': .*another reconstruction of the same scan"):
            loaded(tmp_path, as_csv(rows))


def test_a_table_may_mix_real_scans_and_phantoms(tmp_path):
    rows = real_rows()
    write_nifti(tmp_path / "01.nii.gz", chest() + np.int16(1024), affine=np.diag([1, 1, 1, 1]))
    rows[0] |= dict(rescale_slope="1", rescale_intercept="-1024", spacing_d="12.5", spacing_h="8", spacing_w="7.5")
    rows[0]["stored_as"] = "SPL"  # not as its header says
    found = loaded(tmp_path, as_csv(rows))
    volume = volume_from_row(found.iloc[0])
    assert np.array_equal(volume.hu, chest()) and volume.spacing == (12.5, 8.0, 7.5)
    assert volume_from_row(found.iloc[4]).hu.tobytes() == study_from_row(found.iloc[4]).volume.hu.tobytes()
    with pytest.raises(FileNotFoundError, match=r"02\.nii\.gz"):
        volume_from_row(found.to_dict("records")[1])
    with pytest.raises(ValueError, match="study 01 has no seed: it is a real scan"):
        study_from_row(found.iloc[0])


@pytest.mark.parametrize("as_row", [dict, pd.Series])
def test_reading_arguments_are_those_that_the_row_gives(tmp_path, as_row):
    rows = real_rows(tmp_path)
    rows[1] |= dict(rescale_intercept="-8192", orientation="canonical")
    rows[2] |= dict(spacing_d="1,5", spacing_h="0,703", spacing_w="0.7", series="1.2.840", largest_gap="30")
    rows[2]["resample"] = "1"
    rows = [as_row(row) for row in loaded(tmp_path, as_csv(rows)).to_dict("records")]
    assert reading_arguments(rows[0]) == {"path": f"{tmp_path}/01.nii.gz"}
    path = f"{tmp_path}/02.nii.gz"
    assert reading_arguments(rows[1]) == {"path": path, "rescale_intercept": -8192.0, "orientation": "canonical"}
    expected = {"path": f"{tmp_path}/03.nii.gz", "spacing": (1.5, 0.703, 0.7), "series": "1.2.840", "largest_gap": 30}
    expected["resample"] = True
    assert reading_arguments(rows[2]) == expected


def test_a_folder_can_be_moved_with_its_manifest(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    table = pd.DataFrame(real_rows(here / "scans")[:4]).astype({"reconstruction": int})
    table.loc[3, "path"] = str(tmp_path / "elsewhere.nii.gz")
    write_manifest(table, here / "m.csv")
    written = pd.read_csv(here / "m.csv", dtype=str)["path"].tolist()
    assert written == ["scans/01.nii.gz", "scans/02.nii.gz", "scans/03.nii.gz", str(tmp_path / "elsewhere.nii.gz")]
    here.rename(there)
    moved = load_manifest(there / "m.csv")
    assert moved["path"].tolist()[0] == str(there / "scans" / "01.nii.gz")
    assert moved["path"].tolist()[3] == str(tmp_path / "elsewhere.nii.gz")


def test_a_relative_path_in_memory_counts_from_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = pd.DataFrame(real_rows("scans")[:4]).astype({"reconstruction": int})
    again = load_manifest(write_manifest(table, "sub/m.csv"))
    assert again["path"][0] == str(tmp_path / "scans" / "01.nii.gz"), "the same file as before"


# --- wrong values -------------------------------------------------------------------------------------


def change(table, column, value, row=4):
    broken = table.copy()
    broken[column] = broken[column].astype(object)
    broken.loc[broken.index[row], column] = value
    return broken


WRONG = {
    **{"split": ["exam"], "hospital": ["mars"], "seed": [-3, "x", 1.5, np.nan, 1e30], "reconstruction": [None]},
    **{"report": ["", np.nan, "a\0b"], "checksum": ["abc", None], "Emphysema": [2], "Lung nodule": [np.nan]},
    **{"study": [None], "patient": [None], "scan": [""]},
}


@pytest.mark.parametrize(("column", "value"), [(column, value) for column in WRONG for value in WRONG[column]])
def test_a_wrong_value_is_named_with_row_and_column(table, column, value):
    with pytest.raises(ValueError, match=rf"manifest row 6, column '{column}': got .*, expected "):
        validate_manifest(change(table, column, value))


@pytest.mark.parametrize(
    ("row", "column", "value", "expected"),
    [
        (0, "hospital", "", "a name, without spaces"),
        (0, "checksum", "A" * 64, "in small letters"),
        (0, "seed", "x", "a whole number"),
        (0, "rescale_slope", "0", "a number above 0"),
        (0, "rescale_slope", "inf", "a number above 0"),
        (0, "rescale_intercept", "none", "a number"),
        (0, "rescale_intercept", "-1,024", "a number"),  # -1024 or -1.024?
        (0, "spacing_d", "1.5", "needs all of"),
        (0, "orientation", "upright", "'stored', 'canonical' or one each of"),
        (0, "orientation", "SPS", "'stored', 'canonical' or one each of"),
        (1, "reconstruction", "1", r"another number: row 2 is this reconstruction of this scan"),
        (1, "report", "Another report.", r"that of row 2, another reconstruction of the same scan"),
        (1, "Emphysema", "1", r"that of row 2, another reconstruction of the same scan"),
        (3, "path", "./x/../01.nii.gz", r"another file: row 2 is this scan already"),
        (2, "split", "valid", r"train: patient '007' is in two splits \(see row 2\)"),
        (4, "hospital", "St Mary's", r"one of \['source', 'target'\] for a phantom; a real scan needs a path"),
        (4, "rescale_slope", "1", "nothing: a phantom"),
        (4, "series", "1.2", "nothing: a phantom"),
        (4, "seed", "", "a whole number"),
        (4, "checksum", "", "64 hexadecimal digits"),
    ],
)
def test_a_wrong_value_of_a_mixed_table_is_named(tmp_path, row, column, value, expected):
    rows = real_rows()
    rows[row][column] = value
    with pytest.raises(ValueError, match=rf"m\.csv: manifest row \d, column '\w+': got .*{expected}") as caught:
        loaded(tmp_path, as_csv(rows))
    wrong_column = "spacing_h" if column == "spacing_d" else column
    assert f"row {row + 2}, column {wrong_column!r}" in str(caught.value)


@pytest.mark.parametrize("length", ["0", "0.04", "21", "-1", "nan", "x"])
def test_a_spacing_that_no_ct_has_is_refused(tmp_path, length):
    rows = real_rows()
    rows[2] |= dict(spacing_d="1.5", spacing_h="0.7", spacing_w=length)
    with pytest.raises(ValueError, match=r"row 4, column 'spacing_w': .*expected a length from 0\.05 to 20\.0 mm"):
        loaded(tmp_path, as_csv(rows))


def test_one_file_may_not_be_in_two_splits(tmp_path):
    rows = real_rows()
    rows[0]["checksum"] = rows[1]["checksum"] = "a" * 64
    assert len(loaded(tmp_path, as_csv(rows))) == 5, "twice in one split: odd, but no leak"
    rows[3]["checksum"] = "a" * 64
    with pytest.raises(ValueError, match="row 2, column 'checksum': .* study 01 is the same as 04 in the split test"):
        loaded(tmp_path, as_csv(rows))


def test_two_series_of_one_folder_are_two_scans(tmp_path):
    rows = real_rows()
    rows[0] |= dict(path="dicom", series="1.2.3", checksum="a" * 64)
    rows[3] |= dict(path="dicom/", series="1.2.4", checksum="a" * 64)
    assert loaded(tmp_path, as_csv(rows))["series"].tolist()[:4] == ["1.2.3", "", "", "1.2.4"]
    rows[3] |= dict(series="Thorax 1.0")  # a name may be that of the other
    for folder, column in (("dicom", "split"), ("a copy", "checksum")):
        rows[3]["path"] = folder
        with pytest.raises(ValueError, match=f"column '{column}'"):
            loaded(tmp_path, as_csv(rows))


def test_two_acquisitions_of_one_folder_are_two_scans(tmp_path):
    rows = real_rows()
    rows[0] |= dict(path="dicom", acquisition="3")
    rows[2] |= dict(path="dicom", acquisition="4")
    assert loaded(tmp_path, as_csv(rows))["acquisition"].tolist()[:3] == ["3", "", "4"]


@pytest.mark.parametrize(
    "other",
    ["7", "7.0", "007 ", "\u200b007", "00\N{SOFT HYPHEN}7", "\uff10\uff10\uff17", "00\u0667", "007\ufe0f", "\u2060007"],
)
def test_two_spellings_of_one_patient_are_one_patient(tmp_path, other):
    rows = real_rows()
    rows[3]["patient"] = other
    with pytest.raises(ValueError, match=r"row 5, column 'split': .* is in two splits \(see row 2") as caught:
        loaded(tmp_path, as_csv(rows))
    assert other == "007 " or "there '007'" in str(caught.value)


ALIKE = [("Jos\xe9", "Jose\u0301"), ("M\xfcller", "MULLER"), ("P-7", "p\u20117"), ("P-7", "\u0420-007")]  # Cyrillic
ALIKE += [("DOE^JOHN", "doe^john"), ("a b", "a\xa0 b"), ("stra\xdfe", "STRASSE")]
UNLIKE = [("p1", "p10"), ("1-11", "11-1"), ("1.2.840.0", "1.2.840"), ("1.05", "1.5"), ("\u0e01\u0e48", "\u0e01\u0e49")]


@pytest.mark.parametrize(("one", "other"), ALIKE + UNLIKE)
def test_names_that_look_alike_are_one_and_others_are_not(one, other):
    assert (folded(one) == folded(other)) == ((one, other) in ALIKE)


@pytest.mark.parametrize("link", ["symlink_to", "hardlink_to"])
def test_links_to_one_file_are_one_scan(tmp_path, link):
    rows = real_rows(tmp_path)
    (tmp_path / "01.nii.gz").write_bytes(b"scan")
    getattr(tmp_path / "04.nii.gz", link)(tmp_path / "01.nii.gz")
    with pytest.raises(ValueError, match="row 5, column 'path': .* row 2 is this scan already"):
        loaded(tmp_path, as_csv(rows))


def test_a_patient_who_shares_a_volume_with_a_later_split_is_left_out(tmp_path):
    table = pd.DataFrame(real_rows()[:4]).assign(checksum=["a" * 64, "b" * 64, "c" * 64, "a" * 64])
    left, failures = without_leaks(table)
    assert left["study"].tolist() == ["04"] and [failure["study"] for failure in failures] == ["01", "02", "03"]
    assert "patient 007 has a volume (01) equal to 04 of patient 008 in the split test" in failures[0]["message"]
    assert without_leaks(left)[0].equals(left)


def test_an_error_lists_the_first_five_wrong_rows(table):
    broken = table.copy()
    broken.loc[10:19, "split"] = "exam"
    broken.loc[12, "hospital"] = "mars"
    with pytest.raises(ValueError) as caught:
        validate_manifest(broken)
    lines = str(caught.value).splitlines()
    assert lines[0] == "manifest row 12, column 'split': got 'exam', expected one of ('train', 'valid', 'test')"
    assert [line.split()[2] for line in lines[:5]] == ["12,", "13,", "14,", "14,", "15,"]
    assert lines[5:] == ["... and 6 more"]


@pytest.mark.parametrize("name", ["Rescale_Slope", "rescale intercept", "Path", "Spacing D"])
def test_an_optional_column_by_another_spelling_is_not_ignored(table, name):
    with pytest.raises(ValueError, match=f"has a column '{name}'; write it '{name.lower().replace(' ', '_')}'"):
        validate_manifest(table.assign(**{name: 1}))


def test_other_defects_are_refused(table):
    with pytest.raises(ValueError, match=r"\['Lymphadenopathy'\]; 'Lymphadenopaty' may be meant for 'Lymphaden"):
        validate_manifest(table.rename(columns={"Lymphadenopathy": "Lymphadenopaty"}))
    with pytest.raises(ValueError, match="lacks the column 'spacing_h': spacing needs all of"):
        validate_manifest(table.head(1).assign(path="a.nii", spacing_d=1.0))
    twice = change(table, "study", table["study"].iloc[0])
    with pytest.raises(ValueError, match="a name that occurs once"):
        validate_manifest(twice)
    wrong = table.iloc[0].copy()
    wrong["seed"] += 1
    with pytest.raises(ValueError, match="made again it has checksum"):
        verify_row(wrong)


# --- tables as spreadsheets leave them ------------------------------------------------------------------


def number_style(rows, one):
    """Labels and slopes as a spreadsheet may rewrite them."""
    return [row | {"Emphysema": one, "rescale_slope": one if row["path"] else ""} for row in rows[:4]]


TWIN_ROWS = real_rows()[:4]
UNUSUAL = {
    "byte order mark": "\ufeff" + as_csv(number_style(TWIN_ROWS, "1")),
    "semicolons and decimal commas": as_csv(number_style(TWIN_ROWS, "1,0"), ";"),
    "tabs": as_csv(number_style(TWIN_ROWS, "1"), "\t"),
    "decimal commas in quotes": as_csv(number_style(TWIN_ROWS, "1,0")),
    "whole numbers as 1.0": as_csv(number_style(TWIN_ROWS, "1.0")),
    "Windows line ends": as_csv(number_style(TWIN_ROWS, "1")).replace("\n", "\r\n"),
    "old Mac line ends": as_csv(number_style(TWIN_ROWS, "1")).replace("\n", "\r"),
    "UTF-16 with its mark": as_csv(number_style(TWIN_ROWS, "1")).encode("utf-16"),
    "empty rows and columns": as_csv(number_style(TWIN_ROWS, "1")).replace("\n", ",,\n") + ",,,,\n\n",
    "blanks around names": as_csv(number_style(TWIN_ROWS, " 1 "))
    .replace(",007,", ", 007 ,")
    .replace("split", " split"),
}


@pytest.mark.parametrize("content", UNUSUAL.values(), ids=UNUSUAL)
def test_what_has_one_meaning_is_read(tmp_path, content):
    found = loaded(tmp_path, content)
    plain = loaded(tmp_path, as_csv(number_style(TWIN_ROWS, "1")), "plain.csv")
    pd.testing.assert_frame_equal(found, plain)
    assert found["Emphysema"].tolist() == [1] * 4 and found["rescale_slope"].tolist() == [1] * 4


def with_cell(row, column, value):
    rows = real_rows()
    rows[row][column] = value
    return as_csv(rows)


def cut(text, line, drop):
    lines = text.split("\n")
    return "\n".join([*lines[:line], lines[line][:-drop], *lines[line + 1 :]])


PLAIN = as_csv(real_rows())
UNREADABLE = {
    "latin-1 bytes": (
        with_cell(1, "patient", "Müller").encode("latin-1"),
        r"row 3, column 'patient': got b'M\\xfcller', which is not text in UTF-8; save the table as 'CSV UTF-8'",
    ),
    "NUL bytes": (with_cell(2, "scan", "b\0"), r"row 4, column 'scan': got b'b\\x00', which is not text"),
    "a file that ends in zeros": (PLAIN + "\0" * 64, r"row 7, column 'study': got b'\\x00\\x00.*not text"),
    "UTF-16 without its mark": (PLAIN.encode("utf-16-le"), r"row 1, column 'number 1': got b's\\x00t.*not text"),
    "no text at all": (b"\xff\xfe\x00\x01", r"lacks the column\(s\) \['study'"),
    "an empty file": (b"", "the table is empty; expected a header with the columns"),
    "a header without rows": (PLAIN.split("\n")[0], "the manifest has no rows"),
    "a column twice": (PLAIN.replace("age", "report"), r"the column\(s\) \['report'\] occur more than once"),
    "no header": (PLAIN.split("\n", 1)[1], r"lacks the column\(s\) \['study'"),
    "a quote that is never closed": (
        with_cell(1, "report", "QUOTE").replace("QUOTE", '"a'),
        r"row 3: a quotation mark is never closed",
    ),
    "text after a quote": (with_cell(1, "report", "QUOTE").replace("QUOTE", '"a" b'), r"row 3: a quotation mark"),
    "a comma without quotes": (
        with_cell(1, "report", "QUOTE").replace("QUOTE", "a, b"),
        r"row 3 has \d+ cells, the header \d+. A text with a ',' in it needs quotes",
    ),
    "a row cut short": (cut(PLAIN, 5, 30), r"row 6 has \d+ cells, the header \d+"),
    "a wrong value below a text of several lines": (
        with_cell(2, "report", "a\nb\nc").replace("008,test", "008,exam"),
        r"row 5, column 'split': got 'exam'",
    ),
    "a wrong value below empty rows": (
        PLAIN.replace("\n03,", "\n\n,,\n03,").replace("008,test", "008,exam"),
        r"row 7, column 'split': got 'exam'",
    ),
}


@pytest.mark.parametrize(("content", "message"), UNREADABLE.values(), ids=UNREADABLE)
def test_what_has_none_or_two_meanings_is_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=rf"m\.csv.*{message}"):
        loaded(tmp_path, content)


# --- writing ------------------------------------------------------------------------------------------------


def test_a_manifest_that_can_not_be_written_leaves_the_old_one(table, tmp_path):
    old = write_manifest(table.head(3), tmp_path / "m.csv").read_bytes()
    with pytest.raises(ValueError, match="column 'split'"):
        write_manifest(change(table, "split", "exam"), tmp_path / "m.csv")
    assert [file.name for file in tmp_path.iterdir()] == ["m.csv"]
    assert (tmp_path / "m.csv").read_bytes() == old


# --- properties -----------------------------------------------------------------------------------------

SETTINGS = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
WRITABLE = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
VALUES = st.one_of(TEXT, st.sampled_from(["", "0", "1", "-1", "1,0", "nan", "1e999", "'", '"', "007", "train", "\0"]))


@pytest.mark.slow
@SETTINGS
@given(row=st.integers(0, 4), column=st.sampled_from(list(real_rows()[0])), value=VALUES)
def test_any_changed_cell_gives_a_valid_manifest_or_an_error_that_names_it(tmp_path, row, column, value):
    rows = real_rows()
    rows[row][column] = value
    try:
        found = loaded(tmp_path, as_csv(rows, quoting=csv.QUOTE_ALL))  # an unquoted "\r" would end its row
    except ValueError as error:
        assert "row " in str(error) and "column '" in str(error)
        if column not in ("patient", "split", "scan", "path", "report", *FINDINGS, "hospital", "spacing_d"):
            assert f"row {row + 2}, column" in str(error)
    else:
        validate_manifest(found)
        for one in found.to_dict("records"):
            assert not one["path"] or reading_arguments(one)["path"] == one["path"]


@settings(SETTINGS, max_examples=15)
@given(report=WRITABLE, name=WRITABLE)
def test_what_is_written_is_what_is_read(tmp_path, report, name):
    rows = [row | {"age": name} for row in real_rows(tmp_path)[:4]]
    rows[3]["report"] = f"A {report}"
    assert set(READING) <= set(rows[0])
    table = pd.DataFrame(rows).astype({"reconstruction": int})
    found = load_manifest(write_manifest(table, tmp_path / "m.csv"))
    assert found["report"][3] == rows[3]["report"].replace("\r\n", "\n").replace("\r", "\n")
    assert found["age"][0] == name.replace("\r\n", "\n").replace("\r", "\n")
    again = write_manifest(found, tmp_path / "again.csv").read_bytes()
    assert again == (tmp_path / "m.csv").read_bytes()
