"""What `medctkit predict` writes of one scan."""

import json

import pandas as pd
import pytest
import torch
from dicom_peers import write_phantom
from tiny import randomise_adapter
from typer.testing import CliRunner

from medctkit.cli import app
from medctkit.cli_deploy import with_adapter
from medctkit.deploy.predict import case_of, facts_of
from medctkit.findings import FINDINGS
from medctkit.lora.adapter import add_lora, save_adapter
from medctkit.lora.methods import apply_method, save_trained
from medctkit.model.base_model import load_base
from medctkit.model.fingerprint import digests
from medctkit.quickstart import classify
from medctkit.scans.volumes import read_volume

pytestmark = pytest.mark.usefixtures("one_thread", "on_the_cpu")


@pytest.mark.parametrize(
    ("path", "case"),
    [("a/valid_1_a_1.nii.gz", "valid_1_a_1"), ("B.MHA", "B"), ("patient.7", "patient.7"), ("study/", "study")],
)
def test_case_is_the_name_without_suffix(path, case):
    assert case_of(path) == case


def test_command_writes_the_scores_of_classify_in_every_form(tmp_path):
    _, folder = write_phantom(tmp_path / "study")
    done = CliRunner().invoke(app, ["predict", str(folder), str(tmp_path / "out"), "--model", "mini"])
    assert done.exit_code == 0, done.output
    assert "Pleural effusion" in done.output
    base = load_base()
    expected = classify(read_volume(folder), base).scores  # the file rounds where slices lie
    table = pd.read_csv(tmp_path / "out" / "scores.csv").set_index("finding")["score"].to_dict()
    own, challenge = (json.loads((tmp_path / "out" / name).read_text()) for name in ("scores.json", "results.json"))
    (entry,) = challenge.pop("predictions")
    assert table == own["scores"] == entry["probabilities"] == expected
    assert list(expected) == list(FINDINGS)
    assert entry["input_image_name"] == own["case"] == "study"
    assert own["model"] == facts_of(base)
    version = {"major": 1, "minor": 0}  # what the challenge's own example writes
    assert challenge == {
        "name": "Generated probabilities",
        "type": "Abnormality Classification",
        "version": version,
    }
    assert (tmp_path / "out" / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_guesses_the_model(tmp_path):
    _, folder = write_phantom(tmp_path / "study")
    done = CliRunner().invoke(app, ["predict", str(folder), str(tmp_path / "out")])
    assert done.exit_code == 2
    assert "--model" in done.output
    assert not (tmp_path / "out").exists()


def test_adapter_is_used_and_named(tmp_path):
    _, folder = write_phantom(tmp_path / "study")
    adapted = randomise_adapter(add_lora(load_base().model), 0.02)
    save_adapter(adapted, tmp_path / "adapter")
    for name, more in {"base": [], "adapted": ["--adapter", str(tmp_path / "adapter")]}.items():
        command = ["predict", str(folder), str(tmp_path / name), "--model", "mini", *more]
        assert CliRunner().invoke(app, command).exit_code == 0
    base, with_adapter = (json.loads((tmp_path / name / "scores.json").read_text()) for name in ("base", "adapted"))
    assert base["scores"] != with_adapter["scores"]
    assert base["model"]["base"] == with_adapter["model"]["base"]
    assert (base["model"]["adapter"], with_adapter["model"]["adapter"]) == ("none", digests(adapted)[1])


def test_what_was_trained_without_an_adapter_is_taken_as_well(tmp_path):
    trained = apply_method(load_base().model, "bitfit")
    with torch.no_grad():
        for p in trained.parameters():
            p.add_(0.01 * p.requires_grad)
    save_trained(trained, tmp_path / "adapter")
    assert digests(with_adapter("mini", None, tmp_path / "adapter").model) == digests(trained)
