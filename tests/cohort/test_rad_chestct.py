"""RAD-ChestCT, against an imitation of its record on loopback, with phantoms as its .npz files."""

import numpy as np
import pytest
from open_imitations import zenodo
from typer.testing import CliRunner

from medctkit import cli
from medctkit.cohort import rad_chestct
from medctkit.cohort.manifest import load_manifest, volume_from_row
from medctkit.cohort.open_data import fetch
from medctkit.findings import FINDINGS
from medctkit.phantom import generate
from medctkit.scans.volumes import read_volume

SCANS = {"tst1": "mrn1", "tst2": "mrn1", "tst3": "mrn2", "trn1": "mrn3"}
SHAPE = (60, 40, 40)


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """Files as the record has them: label columns "abnormality*place", volumes from the head down."""
    folder = tmp_path_factory.mktemp("record")
    sets = {name: "imgtrain" if name.startswith("trn") else "imgtest" for name in SCANS}
    lines = [f"{patient},{name},{sets[name]}_extra,{sets[name]}" for name, patient in SCANS.items()]
    (folder / "Summary_3630.csv").write_text("\n".join(["MRN_DEID,NoteAcc_DEID,Set_Assigned,Subset_Assigned", *lines]))
    known = [name for row in rad_chestct.LABELS for name in row["rad_chestct"].split(";")]
    columns = [f"{name}*{place}" for name in [*known, "mass"] for place in ("lung", "other_location")]
    for subset in ("imgtrain", "imgvalid", "imgtest"):
        rows = [",".join(["NoteAcc_DEID", *columns])]
        for name in [name for name in SCANS if sets[name] == subset]:
            present = {"tst1": ["nodule*other_location", "stent*lung"], "tst3": ["calcification*lung", "mass*lung"]}
            rows.append(",".join([name, *("1.0" if c in present.get(name, ()) else "0.0" for c in columns)]))
        (folder / f"{subset}_Abnormality_and_Location_Labels.csv").write_text("\n".join(rows))
    for seed, name in enumerate(SCANS):
        hu = generate(seed, shape=SHAPE).volume.reoriented("IPL").hu
        np.savez_compressed(folder / f"{name}.npz", ct=np.clip(np.rint(hu), -1000, 1000).astype(np.int16))
    return folder


@pytest.fixture
def served(record, monkeypatch):
    with zenodo(record, rad_chestct.RECORD) as server:
        monkeypatch.setattr(rad_chestct, "ZENODO", server.url)
        monkeypatch.setattr(rad_chestct, "SPACING", 6.0)  # of these small volumes
        monkeypatch.delenv("ZENODO_TOKEN", raising=False)
        yield server


def download(*arguments):
    return CliRunner().invoke(cli.app, ["download", *map(str, arguments), "--source", "rad-chestct"])


def test_each_of_16_classes_has_a_source_and_a_name_of_ct_clip():
    names = [name for row in rad_chestct.LABELS for name in row["finding"].split(";")]
    assert len(rad_chestct.LABELS) == 16 and set(FINDINGS) - set(names) == {"Mosaic attenuation pattern"}
    assert len(names) == len(set(names)) == 17
    assert all(row["source"].startswith("https://github.com/") and row["rad_chestct"] for row in rad_chestct.LABELS)


def test_the_licence_is_told_before_anything_and_what_comes_is_a_cohort_that_can_be_read(served, record, tmp_path):
    said = download(tmp_path, "--split", "test")
    assert said.exit_code == 0, said.output
    assert said.output.startswith("cc-by-nc-nd-4.0 (open access). Draelos, R. L.: RAD-ChestCT Dataset")
    table = load_manifest(tmp_path / "manifest.csv").set_index("study", drop=False)
    assert list(table["patient"]) == ["mrn1", "mrn1", "mrn2"] and set(table["split"]) == {"test"}
    first, third = table.loc["tst1"], table.loc["tst3"]
    assert {name for name in FINDINGS if first[name] == 1} == {"Lung nodule", "Medical material"}
    assert {name for name in FINDINGS if third[name] == 1} == {
        "Arterial wall calcification",
        "Coronary artery wall calcification",
    }
    assert table["Mosaic attenuation pattern"].isna().all()
    volume = volume_from_row(first.to_dict())
    expected = np.clip(np.rint(generate(0, shape=SHAPE).volume.hu), -1000, 1000)
    np.testing.assert_array_equal(volume.hu, expected)
    assert volume.orientation == "SPL" and volume.spacing == (6.0, 6.0, 6.0)
    assert "cc-by-nc-nd-4.0" in (tmp_path / "LICENCES.txt").read_text()


def test_a_damaged_file_is_not_kept_and_the_next_run_fetches_it_alone(served, tmp_path):
    served.answer.spoilt.add("tst3.npz")
    said = download(tmp_path, "--split", "test")
    assert said.exit_code == 1 and "tst3: tst3.npz arrived damaged" in said.output
    assert set(load_manifest(tmp_path / "manifest.csv")["study"]) == {"tst1", "tst2"}
    assert not [file for file in (tmp_path / "scans").iterdir() if file.suffix != ".npz"]
    served.answer.spoilt.clear()
    served.sent.clear()
    fetch(rad_chestct.plan_rad_chestct(tmp_path, split="test"))
    assert sum(served.sent.values()) == 2  # the record and tst3.npz
    assert set(load_manifest(tmp_path / "manifest.csv")["study"]) == {"tst1", "tst2", "tst3"}


def test_a_record_that_gives_its_files_on_request_says_so_and_takes_a_token(record, tmp_path, monkeypatch, capsys):
    with zenodo(record, rad_chestct.RECORD, token="secret.of.mine") as server:
        monkeypatch.setattr(rad_chestct, "ZENODO", server.url)
        monkeypatch.delenv("ZENODO_TOKEN", raising=False)
        with pytest.raises(PermissionError, match="given on request: ask for them there.* into ZENODO_TOKEN"):
            rad_chestct.plan_rad_chestct(tmp_path)
        assert capsys.readouterr().out.startswith("cc-by-nc-nd-4.0 (restricted access)")
        monkeypatch.setenv("ZENODO_TOKEN", "secret.of.mine")
        assert "2 scans of 1 patient, " in str(rad_chestct.plan_rad_chestct(tmp_path, 1, "test"))
    with pytest.raises(ConnectionError, match="no connection to http://127.0.0.1") as caught:
        rad_chestct.plan_rad_chestct(tmp_path)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--split", "dev"], "split 'dev': expected one of train, valid, test"),
        (["--patients", "9"], "9 patients were asked for; there are 3"),
        (["--weights"], "are for CT-RATE"),
    ],
)
def test_what_can_not_be_is_refused(served, tmp_path, arguments, said):
    found = download(tmp_path, *arguments)
    assert found.exit_code == 1 and said in found.output


def test_an_archive_says_neither_size_nor_lie_and_holds_one_array(tmp_path):
    np.savez(tmp_path / "two.npz", a=np.zeros((3, 3, 3)), b=np.zeros(2))
    with pytest.raises(ValueError, match=r"pass spacing=\(d, h, w\) and stored_as="):
        read_volume(tmp_path / "two.npz")
    with pytest.raises(ValueError, match=r"holds \['a.npy', 'b.npy'\]: expected one array"):
        read_volume(tmp_path / "two.npz", spacing=(1, 1, 1), stored_as="IPL")
