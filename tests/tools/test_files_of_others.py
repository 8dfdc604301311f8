"""What somebody else put where a command writes is not lost: it stays, or the command says so and does nothing."""

import json
import os
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from medctkit.cli import app
from medctkit.cohort.manifest import load_manifest, write_manifest
from medctkit.common import atomic
from medctkit.deploy.answer import NAME, write_answer
from medctkit.deploy.export import FACTS, replacing_export
from medctkit.deploy.predict import write_prediction
from medctkit.deploy.series import write_series
from medctkit.experiments import pretrain
from medctkit.experiments.adapt import DEFAULT, Origin
from medctkit.experiments.tables import scores_file
from medctkit.findings import FINDINGS
from medctkit.phantom.study import generate
from medctkit.scans.volumes import CTVolume
from medctkit.training.checkpoints import HISTORY, RECORD, WORK, Run, finished_run, read, refuse_other_settings

SCORES = dict.fromkeys(FINDINGS, 0.5)


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def small(**tags):
    return CTVolume(np.zeros((3, 4, 4), np.int16), (2.0, 1.0, 1.0)), {"PatientID": "P1"} | tags


# --- a manifest, a list of failures, a table of scores ---------------------------------------------------


def test_a_manifest_is_not_replaced_by_that_of_what_came_through(tmp_path):
    write_manifest(load_manifest("data_manifest.csv").head(2), tmp_path / "manifest.csv")
    before = (tmp_path / "manifest.csv").read_bytes()
    done = run("prepare", tmp_path / "manifest.csv", tmp_path, "--model", "mini")
    assert done.exit_code == 1 and "give another OUTPUT_DIR" in done.stderr
    assert (tmp_path / "manifest.csv").read_bytes() == before and not (tmp_path / "prepared").exists()


def test_a_list_of_somebody_elses_failures_stays(tmp_path):
    write_manifest(load_manifest("data_manifest.csv").head(1), tmp_path / "few.csv")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "failures.csv").write_text("mine\n")
    done = run("prepare", tmp_path / "few.csv", tmp_path / "out", "--model", "mini")
    assert done.exit_code == 1 and "no list of failures" in done.stderr
    assert (tmp_path / "out" / "failures.csv").read_text() == "mine\n"


def test_writing_a_manifest_leaves_the_table_as_it_is(tmp_path):
    table = load_manifest("data_manifest.csv").head(1).assign(path=str(tmp_path / "a.nii.gz"), checksum="0" * 64)
    before = table.copy(deep=True)
    write_manifest(table, tmp_path / "manifest.csv")
    pd.testing.assert_frame_equal(table, before)
    assert (
        "a.nii.gz" in (tmp_path / "manifest.csv").read_text()
        and str(tmp_path) not in (tmp_path / "manifest.csv").read_text()
    )


def test_the_default_manifest_takes_the_place_of_none_of_real_scans(tmp_path):
    table = load_manifest("data_manifest.csv").head(1).assign(path=str(tmp_path / "a.nii.gz"), checksum="0" * 64)
    mine = write_manifest(table, tmp_path / "mine.csv")
    before = mine.read_bytes()
    done = run("manifest", mine)
    assert done.exit_code == 1 and "mine.csv is there and lists real scans" in done.stderr
    assert mine.read_bytes() == before


def test_scores_replace_scores_and_nothing_else(tmp_path):
    for name, content in (("manifest.csv", "study,patient,split\n"), ("notes.csv", "")):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match="holds something else than scores"):
            scores_file(tmp_path / name)
    (tmp_path / "scores.csv").write_text("study,patient,finding,label,base,adapted\na,b,c,0,0.1,0.2\n")
    assert scores_file(tmp_path / "scores.csv") == tmp_path / "scores.csv"
    done = run("evaluate", tmp_path, "--scores", tmp_path / "nowhere" / "scores.csv")
    assert done.exit_code == 1 and "there is no folder" in done.stderr


# --- folders of work --------------------------------------------------------------------------------------


def test_a_run_clears_away_its_own_work_alone(tmp_path):
    work = tmp_path / WORK
    (work / "adapter").mkdir(parents=True)
    (work / "thesis.txt").write_text("mine")
    Run._clear(type("Of", (), {"work": work, "file": work / "checkpoint.safetensors"})())
    assert [path.name for path in work.iterdir()] == ["thesis.txt"]
    (work / "thesis.txt").unlink()
    Run._clear(type("Of", (), {"work": work, "file": work / "checkpoint.safetensors"})())
    assert not work.exists()


def test_a_history_of_no_run_is_not_replaced(tmp_path):
    write_manifest(load_manifest("data_manifest.csv").head(1), tmp_path / "few.csv")
    (tmp_path / HISTORY).write_text("mine")

    class Here:
        output_dir, adapter_dir, file = tmp_path, tmp_path / "adapter", tmp_path / WORK / "checkpoint.safetensors"
        _ended = list  # anything that can be called

    with ExitStack() as Here._held, pytest.raises(ValueError, match="history.csv is there, and no run.json"):
        Run._found(Here())
    assert (tmp_path / HISTORY).read_text() == "mine"


def test_pretraining_takes_the_place_of_a_model_of_its_own_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else than a model"):
        pretrain.pretrain(tmp_path, tmp_path / "pool")
    assert not (tmp_path / "pool").exists()
    (tmp_path / pretrain.RECORD).write_text("{}")
    pretrain.refuse_other_folder(tmp_path)
    pretrain.refuse_other_folder(tmp_path / "new")


# --- exports ----------------------------------------------------------------------------------------------


def test_an_export_takes_the_place_of_an_export_and_of_nothing_beside_it(tmp_path):
    folder, link = tmp_path / "export", tmp_path / "link"
    folder.mkdir()
    link.symlink_to(folder)
    for name in (FACTS, "vision.onnx", "vision.onnx.data", "notes.md"):
        (folder / name).write_text("old")
    (folder / "text").mkdir()
    inode = folder.stat().st_ino
    with pytest.raises(ZeroDivisionError), replacing_export(link) as building:
        (building / FACTS).write_text("half")
        raise ZeroDivisionError
    assert (folder / FACTS).read_text() == (folder / "vision.onnx").read_text() == "old"
    with replacing_export(link) as building:
        (building / FACTS).write_text("new")
        (building / "vision.onnx").write_text("new")
    there = {path.name: path.read_text() for path in folder.iterdir()}
    assert there == {FACTS: "new", "vision.onnx": "new", "notes.md": "old"}, "no weights and no words of the old one"
    assert folder.stat().st_ino == inode and link.is_symlink(), "a mount point cannot be replaced"


def test_half_an_export_may_be_replaced_and_an_empty_folder_filled(tmp_path, monkeypatch):
    (tmp_path / ".export-killed").mkdir()
    (tmp_path / "vision.onnx").write_text("half")
    monkeypatch.chdir(tmp_path)
    with replacing_export(".") as building:
        (building / FACTS).write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == [FACTS]


# --- predictions and answers ------------------------------------------------------------------------------


def test_scores_of_one_scan_never_lie_beside_the_picture_of_another(tmp_path, monkeypatch):
    write_prediction(tmp_path, "first", SCORES, {}, b"first picture")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    real = type(tmp_path).write_bytes

    def full(self, content):
        if b"second picture" in content:
            raise OSError(28, "No space left on device")
        return real(self, content)

    monkeypatch.setattr(type(tmp_path), "write_bytes", full)
    with pytest.raises(OSError, match=r"No space left on device: .*picture\.png"):
        write_prediction(tmp_path, "second", SCORES, {}, b"second picture")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "scores.csv").write_text("study,patient,finding,label,base,adapted\n")
    with pytest.raises(ValueError, match="holds something else than scores of one scan"):
        write_prediction(tmp_path, "third", SCORES, {}, b"third picture")


def test_files_are_replaced_all_or_none(tmp_path):
    assert [path.name for path in atomic.replace_all({"a": b"1", "b": b"2"}, tmp_path / "new")] == ["a", "b"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a", "b"]


def test_an_answer_takes_the_place_of_a_whole_answer_and_of_no_slice(tmp_path):
    from pydicom import dcmread

    volume, tags = small(ManufacturerModelName=NAME)
    made = dcmread(write_series(volume, tmp_path / "made", tags) / "0000.dcm")

    def answered(*kinds):
        for kind in kinds:
            made.Modality = kind
            write_answer([made], tmp_path / "out")

    made.Modality = "SEG"
    write_answer([made], tmp_path / "out")
    answered("SR")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["SR.dcm"], "the segmentation was another scan's"
    slices = write_series(*small()[:1], tmp_path / "study", small()[1])
    (slices / "0001.dcm").rename(slices / "SR.dcm")
    before = (slices / "SR.dcm").read_bytes()
    with pytest.raises(ValueError, match=r"SR\.dcm is there, and no answer"):
        write_answer([made], slices)
    assert (slices / "SR.dcm").read_bytes() == before


def test_two_series_do_not_mix_and_a_misspelt_tag_is_told(tmp_path):
    volume, tags = small()
    write_series(volume, tmp_path / "series", tags)
    with pytest.raises(ValueError, match="slices of two scans would mix"):
        write_series(volume, tmp_path / "series", tags)
    with pytest.raises(ValueError, match="'PatientId' is no DICOM keyword"):
        write_series(volume, tmp_path / "other", {"PatientId": "P1"})
    assert not (tmp_path / "other").exists()


# --- arguments and records --------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [("predict", "", "out"), ("predict", "a", ""), ("answer", "a", "b", "--model=")])
def test_an_empty_argument_is_no_folder(arguments):
    done = run(*arguments, *([] if "--model=" in arguments else ["--model", "mini"]))
    assert done.exit_code == 2 and "is empty" in done.output


@pytest.mark.parametrize("command", ["predict", "answer"])
def test_a_file_where_a_folder_is_to_be_is_told_before_anything_is_scored(command, tmp_path):
    (tmp_path / "out").write_text("mine")
    done = run(command, tmp_path, tmp_path / "out", "--model", "mini")
    assert done.exit_code == 2 and "file" in done.output and (tmp_path / "out").read_text() == "mine"


def test_what_is_no_dicom_gets_no_answer_and_no_score(tmp_path):
    (tmp_path / "scan.nii.gz").write_bytes(b"\x1f\x8b")
    done = run("answer", tmp_path / "scan.nii.gz", tmp_path / "out", "--model", "mini", "--no-map")
    assert done.exit_code == 1 and "scan.nii.gz is no DICOM" in done.stderr


@pytest.mark.parametrize(
    "changes", [{"dropout": float("nan")}, {"dropout": -0.1}, {"dropout": 1.0}, {"alpha": float("nan")}, {"alpha": 0.0}]
)
def test_settings_of_an_adapter_are_told_by_name(changes):
    (name,) = changes
    with pytest.raises(ValueError, match=f"{name} must be"):
        replace(DEFAULT, **changes)
    assert replace(DEFAULT, alpha=8.0, dropout=0.1).alpha == 8


def test_damaged_records_are_told(tmp_path):
    (tmp_path / RECORD).write_text(json.dumps({"files": {}, "made_of": {}, "step": 1}))
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        finished_run(tmp_path)
    whole = {"files": {}, "made_of": {}, "step": 1, "best_step": 1, "best_score": 0.5, "seconds": 1, "history": []}
    for wrong in ([], "run", None, whole | {"step": "1"}, whole | {"made_of": []}, whole | {"files": []}):
        (tmp_path / RECORD).write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=r"run\.json is damaged"):
            finished_run(tmp_path)
    (tmp_path / RECORD).write_text(json.dumps(whole))
    (tmp_path / "origin.json").write_text(json.dumps({"model": 5}))
    with pytest.raises(ValueError, match=r"origin\.json does not say what was adapted"):
        Origin.of(tmp_path)
    (tmp_path / RECORD).unlink()
    (tmp_path / WORK).mkdir()
    for text in ("[", "[]", '{"made_of": [1]}'):
        save_file({"a": np.zeros(1)}, tmp_path / WORK / "checkpoint.safetensors", {"medctkit": text, "sha256": "0"})
        refuse_other_settings(tmp_path, DEFAULT.config(0))  # no error: there is nothing to hold the settings against
        with pytest.raises(ValueError, match=r"checkpoint\.safetensors is damaged, or no checkpoint .* Delete"):
            read(tmp_path / WORK / "checkpoint.safetensors", {})


@pytest.mark.skipif(os.name != "posix", reason="file names are bytes on Linux and macOS alone")
def test_a_file_name_of_an_old_disk_is_shown():
    from medctkit.quickstart import classify

    found = replace(classify(generate(1, shape=(32, 48, 48))), title=os.fsdecode(b"Gr\xf6\xdfe.nii.gz"))
    assert found._repr_png_()[0].startswith(b"\x89PNG")


def test_labels_that_say_nothing_are_told():
    from medctkit.quickstart import classify

    for labels in ({"emphysema": 1}, {"Emphysema": 7}):
        with pytest.raises(ValueError, match="expected 0, 1 or NaN for names of FINDINGS"):
            classify(labels=labels)
