"""An answer in DICOM: valid, about the right patient, says what it is, and can be read back."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
from dicom_peers import PATIENT, values_of, write_phantom
from pydicom import dcmread
from scan_files import change, enhanced
from typer.testing import CliRunner

from medctkit.cli import app
from medctkit.deploy.answer import NOTICE, answer, write_answer
from medctkit.findings import FINDINGS
from medctkit.model.base_model import load_base
from medctkit.quickstart import answer_study
from medctkit.scans.heat_map import HeatMap
from medctkit.scans.volumes import read_volume

SCORES = {name: (i + 1) / 19 for i, name in enumerate(FINDINGS)}
FACTS = {"version": "1.2", "base": "b" * 32, "adapter": "a" * 32, "vocabulary": "v" * 32, "prompts": "paper"}
PICTURE = np.zeros((40, 60, 3), np.uint8)


def heat_map(volume, hot=(1, 2, 6)):
    """A map of 4 x 8 x 8 cells over the volume, one of them hot."""
    values = np.zeros((4, 8, 8))
    values[hot] = 1
    size = np.array(volume.shape) / values.shape
    middle = np.append((size - 1) / 2, 1)
    affine = volume.affine @ np.diag([*size, 1])
    affine[:, 3] = volume.affine @ middle
    return HeatMap(values, affine, "Relevance to Cardiomegaly")


@pytest.fixture
def study(tmp_path):
    return write_phantom(tmp_path / "study")


def answers(folder, volume=None, **choices):
    map_ = None if volume is None else heat_map(volume)
    return {made.Modality: made for made in answer(folder, SCORES, FACTS, PICTURE, map_, **choices)}


def validated(paths):
    if shutil.which("dciodvfy") is None:
        pytest.skip("no dciodvfy; Debian: apt-get install dicom3tools")
    for path in paths:
        said = subprocess.run(["dciodvfy", "-new", path], capture_output=True, text=True, errors="replace").stderr
        errors = [line for line in said.splitlines() if line.startswith(("Error", "Abort"))]
        yield path.name, errors


@pytest.mark.parametrize("tags", [{"PatientBirthDate": "", "PatientSex": "F"}, {"SeriesNumber": None, "StudyID": None}])
def test_dciodvfy_finds_no_error(tmp_path, tags):
    volume, folder = write_phantom(tmp_path / "study", **{"PatientBirthDate": "", "PatientSex": ""} | tags)
    paths = write_answer(answers(folder, volume).values(), tmp_path / "out")
    assert dict(validated([folder / "0003.dcm", *paths])) == {
        "0003.dcm": [], "SR.dcm": [], "OT.dcm": [], "SEG.dcm": []
    }  # fmt: skip


def test_report_says_what_it_is_and_by_whom(study):
    report = answers(study[1])["SR"]
    assert (report.PreliminaryFlag, report.VerificationFlag) == ("PRELIMINARY", "UNVERIFIED")
    assert report.ContentTemplateSequence[0].TemplateIdentifier == "1500"
    assert values_of(report, "FloatingPointValue") == list(SCORES.values())  # to the last bit
    meanings = values_of(report, "CodeMeaning")
    assert [name for name in meanings if name in SCORES] == list(SCORES)
    assert NOTICE in meanings
    texts = values_of(report, "TextValue")
    for name in ("base", "adapter", "vocabulary"):
        assert f"{name}: {FACTS[name]}" in texts
    referred = values_of(report, "ReferencedSOPInstanceUID")
    assert set(referred) == {dcmread(path).SOPInstanceUID for path in study[1].glob("*.dcm")}


def test_patient_and_study_are_those_of_the_scan_letter_by_letter(study, tmp_path):
    paths = write_answer(answers(study[1], study[0]).values(), tmp_path / "out")
    source = dcmread(study[1] / "0000.dcm")
    for path in paths:
        made = dcmread(path)
        for tag in PATIENT.keys() - {"SeriesNumber"} | {"StudyInstanceUID"}:
            assert made[tag].value == source[tag].value
        assert made.SeriesInstanceUID != source.SeriesInstanceUID
        assert NOTICE in made.SeriesDescription


def test_same_answer_has_the_same_uids_and_another_has_others(study):
    first, second = answers(study[1], study[0]), answers(study[1], study[0])
    uids = {name: made.SOPInstanceUID for name, made in first.items()}
    assert {name: made.SOPInstanceUID for name, made in second.items()} == uids
    other = answer(study[1], SCORES, FACTS | {"adapter": "none"}, PICTURE)
    (study[1] / "0023.dcm").unlink()
    assert not {*uids.values()} & {made.SOPInstanceUID for made in [*other, *answers(study[1]).values()]}


def test_uids_are_the_same_whatever_files_are_called_and_others_for_a_corrected_patient(study, tmp_path):
    first, turned = answers(study[1])["SR"].SOPInstanceUID, tmp_path / "turned"
    turned.mkdir()
    for i, path in enumerate(sorted(study[1].iterdir(), reverse=True)):
        shutil.copy(path, turned / f"{i:04}.dcm")
    assert answers(turned)["SR"].SOPInstanceUID == first
    for path in turned.iterdir():
        change(path, PatientID="MRN-1")
    assert answers(turned)["SR"].SOPInstanceUID != first


def frames_that_say_all(folder):
    """One file, of which each frame says for itself how it lies."""
    path = enhanced(sorted(folder.glob("*.dcm")), folder / "whole.dcm")
    whole = dcmread(path)
    (shared,) = whole.SharedFunctionalGroupsSequence
    for frame in whole.PerFrameFunctionalGroupsSequence:
        frame.update(shared)
    del whole.SharedFunctionalGroupsSequence
    whole.save_as(path)


def rounded(folder):
    """The direction of a row is not in all slices the same."""
    change(folder / "0003.dcm", ImageOrientationPatient=[1, 1e-4, 0, -1e-4, 1, 0])


@pytest.mark.parametrize("thickness", [None, "", "0"])
@pytest.mark.parametrize("spoil", [lambda folder: None, rounded, frames_that_say_all])
def test_segmentation_is_made_whatever_a_scanner_leaves_out_or_says_of_each_frame(study, thickness, spoil):
    volume, folder = study
    for path in folder.glob("*.dcm"):
        change(path, SliceThickness=thickness)
    spoil(folder)
    found = answers(folder, volume)["SEG"]
    assert np.array_equal(stored(volume, found), heat_map(volume).on_voxels(volume) > 0)
    measures = found.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert measures.SliceThickness == pytest.approx(volume.spacing[0], abs=1e-3)


def stored(volume, found):
    """A segmentation as a mask of the volume, put where its frames say."""
    mask, pixels = np.zeros(volume.shape, bool), found.pixel_array.reshape(-1, found.Rows, found.Columns)
    for frame, picture in zip(found.PerFrameFunctionalGroupsSequence, pixels, strict=True):
        x, y, z = map(float, frame.PlanePositionSequence[0].ImagePositionPatient)
        d, h, w = np.rint(np.linalg.solve(volume.affine, [-x, -y, z, 1])[:3]).astype(int)
        assert (h, w) == (0, 0)
        mask[d] = picture
    return mask


@pytest.mark.parametrize("kind", ["slices", "enhanced", "zip", "copies"])
def test_segmentation_lies_where_the_map_is_high(study, tmp_path, kind):
    volume, folder = study
    path = folder
    if kind == "enhanced":
        path = enhanced(sorted(folder.glob("*.dcm")), folder / "whole.dcm")
    elif kind == "zip":
        path = shutil.make_archive(str(tmp_path / "study"), "zip", folder)
    elif kind == "copies":
        shutil.copy(folder / "0011.dcm", folder / "copy.dcm")
    assert np.array_equal(read_volume(path).hu, volume.hu)
    found = answers(path, volume)["SEG"]
    on_voxels = heat_map(volume).on_voxels(volume)
    assert np.array_equal(stored(volume, found), on_voxels > 0)
    assert stored(volume, found).any()


def test_no_segmentation_where_there_is_nothing_to_show(study, tmp_path):
    volume, folder = study
    flat = HeatMap(np.ones((4, 8, 8)), np.diag([20, 20, 20, 1]))
    assert [made.Modality for made in answer(folder, SCORES, FACTS, PICTURE, flat)] == ["SR", "OT"]
    for path in folder.glob("*.dcm"):
        change(path, FrameOfReferenceUID=None)
    assert set(answers(folder, volume)) == {"SR", "OT"}


@pytest.mark.parametrize("tag", ["StudyInstanceUID", "SOPInstanceUID"])
def test_slices_that_no_answer_can_refer_to_are_refused(study, tag):
    change(study[1] / "0007.dcm", **{tag: ""})
    with pytest.raises(ValueError, match=rf"0007\.dcm.*{tag}|StudyInstanceUID"):
        answers(study[1])


def test_study_with_its_answers_beside_the_ct_is_read_and_answered(study):
    volume, folder = study
    before = answers(folder, volume)
    write_answer(before.values(), folder / "answers")
    assert np.array_equal(read_volume(folder).hu, volume.hu)
    assert answers(folder)["SR"].SOPInstanceUID == before["SR"].SOPInstanceUID


@pytest.mark.usefixtures("one_thread", "on_the_cpu")
def test_whole_answer_of_the_mini_model(study):
    found = {made.Modality: made for made in answer_study(study[1], load_base())}
    scores = values_of(found["SR"], "FloatingPointValue")
    assert len(scores) == 18
    assert FINDINGS[int(np.argmax(scores))] in found["SEG"].SegmentSequence[0].SegmentLabel
    assert found["OT"].pixel_array.std() > 20
    assert found["OT"].BurnedInAnnotation == "NO"


@pytest.mark.parametrize("command", [["answer", "study", "out"], ["gateway", "queue", "PACS@127.0.0.1:1"]])
def test_commands_name_the_extra_that_is_missing(monkeypatch, command):
    monkeypatch.setitem(sys.modules, "highdicom", None)
    done = CliRunner().invoke(app, [*command, "--model", "mini"])
    assert done.exit_code == 1
    assert "medctkit[deploy]" in done.output


def test_command_writes_the_objects(study, tmp_path):
    done = CliRunner().invoke(app, ["answer", str(study[1]), str(tmp_path / "out"), "--model", "mini", "--no-map"])
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["OT.dcm", "SR.dcm"]
