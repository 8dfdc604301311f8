"""The experiment on a handful of phantoms: any base model, any hospital, one call or one command each."""

import json
import subprocess
import sys
from dataclasses import replace

import pandas as pd
import pytest
import torch

from medctkit.cli import app
from medctkit.cohort.dataset import load_split, prepared_dir
from medctkit.cohort.manifest import load_manifest, write_manifest
from medctkit.experiments.adapt import DEFAULT, FULL_SIZE, Origin, adapt
from medctkit.experiments.audit import DEFECTS
from medctkit.experiments.measure import measure
from medctkit.model import ct_clip as ctclip
from medctkit.model.base_model import FOLDER, load_base, load_mini_base
from medctkit.model.ct_clip import CTCLIPConfig, CTCLIPModel, released_layout
from medctkit.zero_shot.prompts import PROMPTS

pytestmark = pytest.mark.usefixtures("on_the_cpu")

QUICK = replace(DEFAULT, rank=2, steps=2, batch_size=4, evaluate_every=1)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A manifest of few studies, with their prepared volumes beside it."""
    from pathlib import Path

    folder = tmp_path_factory.mktemp("few")
    table = load_manifest(Path(__file__).parents[2] / "data_manifest.csv")
    target = table[table["hospital"] == "target"]
    parts = [target[target["split"] == split].head(n) for split, n in (("train", 8), ("valid", 12), ("test", 24))]
    write_manifest(pd.concat(parts), folder / "manifest.csv")
    (folder / "prepared").mkdir()
    return folder / "manifest.csv"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Weights in the released layout, unused tensors included, of a model that reads the mini model's volumes."""
    torch.manual_seed(0)
    vision = dict(dim=16, codebook_size=16, image_size=64, num_frames=32, patch_size=16, temporal_patch_size=16)
    vision |= dict(spatial_depth=1, temporal_depth=1, dim_head=8, heads=2)
    text = dict(vocab_size=904, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = CTCLIPModel(CTCLIPConfig(vision, text))
    state = {name: torch.zeros(entry.shape) for name, entry in released_layout(model.config).items()}
    file = tmp_path_factory.mktemp("released") / "tiny.pt"
    torch.save(state | model.state_dict(), file)
    model.save_pretrained(file.parent / "folder")
    return file


def test_adapt_and_measure_by_default_the_mini_model(few, tmp_path):
    result = adapt(few, tmp_path, settings=QUICK)
    assert result.adapter_dir == tmp_path / "adapter"
    assert json.loads((tmp_path / "origin.json").read_text()) == {
        "model": "mini",
        "tokenizer": None,
        "hospital": "target",
    }
    measured = measure(few, tmp_path)
    found = measured.summary
    assert json.loads((tmp_path / "metrics.json").read_text()) == found
    assert found["made_with"]["data"] == "phantom"
    assert measured.adapter["vision"] == 8 and measured.adapter["text"] == 6
    assert measured.adapter["trainable"] == 55_296 * 2 // 16
    assert len(measured.retrieval) == 2 * 5 and measured.retrieval["value"].between(0, 1).all()
    assert [defect.name for defect in measured.defects][0] == "unused bootstrap"
    assert {defect.name for defect in measured.defects} == set(DEFECTS)
    assert set(measured.prompts["set"]) == set(PROMPTS) and len(measured.prompts) == 2 * len(PROMPTS)
    assert len(list((few.parent / "prepared").glob("*.safetensors"))) == 44
    assert not (tmp_path / "prepared").exists()


def test_any_base_model_is_adapted_and_measured_with_what_was_written_down(few, tmp_path, checkpoint):
    origin = Origin(str(checkpoint.parent / "folder"), str(FOLDER), None)
    settings = replace(FULL_SIZE, steps=2, batch_size=4, evaluate_every=1, workers=0, rank=2)
    result = adapt(few, tmp_path, settings=settings, origin=origin)
    assert len(result.history) == 3
    assert measure(few, tmp_path, batch_size=2).made_with["data"] == "phantom"
    assert Origin.of(tmp_path) == origin


def test_half_precision_and_recomputed_activations_change_little(few, tmp_path):
    plain = adapt(few, tmp_path / "plain", settings=QUICK).history
    thrifty = replace(QUICK, mixed_precision="bf16", gradient_checkpointing=True, micro_batch_size=2)
    small = adapt(few, tmp_path / "small", settings=thrifty).history
    assert small["loss"].dropna().tolist() == pytest.approx(plain["loss"].dropna().tolist(), rel=0.1)


def test_load_base(checkpoint, tmp_path, monkeypatch):
    config = json.loads((checkpoint.parent / "folder" / "config.json").read_text())
    with pytest.raises(ValueError, match="is not a CT-CLIP checkpoint of these sizes"):
        load_base(checkpoint, FOLDER)
    monkeypatch.setattr(ctclip, "RELEASED_VISION", config["vision_config"])
    monkeypatch.setattr(ctclip, "RELEASED_TEXT", config["text_config"])
    released = load_base(checkpoint, FOLDER)
    assert released.preprocess_config.shape == (32, 64, 64)
    weights = load_base(checkpoint.parent / "folder", FOLDER).model.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in released.model.state_dict().items())
    assert load_base().model.num_parameters() == load_mini_base().model.num_parameters()
    with pytest.raises(FileNotFoundError, match="holds weights only; give the folder of its tokenizer too"):
        load_base(checkpoint)
    with pytest.raises(FileNotFoundError, match=r"nowhere: expected mini, a model's folder .* or a checkpoint file"):
        load_base("nowhere")
    with pytest.raises(FileNotFoundError, match="has no tokenizer: expected a tokenizer.json or vocab.txt"):
        load_base(checkpoint.parent / "folder")
    with pytest.raises(ValueError, match="the mini model has a tokenizer of its own"):
        load_base("mini", FOLDER)
    CTCLIPModel(CTCLIPConfig(text_config={"vocab_size": 50})).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has 904 words, the model knows 50; it is the tokenizer of another model"):
        load_base(tmp_path, FOLDER)


def test_a_hospital_that_the_manifest_lacks_is_named(few):
    with pytest.raises(ValueError, match=r"no train studies of hospital 'north'; its hospitals are target"):
        load_split(load_manifest(few), "north", "train", load_mini_base().preprocess_config, None)


def test_where_prepared_volumes_are(few, tmp_path):
    assert prepared_dir(few, tmp_path) == few.parent / "prepared"
    assert prepared_dir(few, tmp_path, "elsewhere").name == "elsewhere"
    assert prepared_dir(tmp_path / "manifest.csv", tmp_path / "run") == tmp_path / "run" / "prepared"


def test_the_commands_tell_what_is_wrong_without_a_traceback(few, tmp_path):
    from typer.testing import CliRunner

    def run(*arguments):
        return CliRunner().invoke(app, list(map(str, arguments)))

    done = run("finetune", tmp_path, "--manifest", few, "--steps", 2, "--batch-size", 4, "--rank", 2)
    assert done.exit_code == 0 and "best validation AUROC" in done.stdout and "tensorboard --logdir" in done.stdout
    done = run("evaluate", tmp_path, "--manifest", few)
    assert done.exit_code == 0 and "mean AUROC" in done.stdout and "report.html" in done.stdout
    for arguments, message in (
        (("--batch-size", 99), "8 training studies are fewer than one batch of 99"),
        (("--batch-size", 4, "--micro-batch-size", 3), "micro_batch_size must be None or a divisor of batch_size 4"),
        (("--preset", "papre"), "unknown LoRA preset 'papre'"),
        (("--mixed-precision", "fp8"), "mixed_precision must be 'no', 'bf16' or 'fp16', got 'fp8'"),
        (("--model", "nothing.pt"), "nothing.pt: expected mini, a model's folder"),
    ):
        done = run("finetune", tmp_path / "other", "--manifest", few, *arguments)
        assert done.exit_code == 1 and f"error: {message}" in done.stderr.replace("FineTuneConfig.", ""), arguments


def test_two_processes_by_accelerate_launch(few, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu"]
    launch += ["--num_machines", "1", "--num_processes", "2", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", "0", "-m", "medctkit.cli"]
    shared = tmp_path / "shared"
    for command in (
        ["finetune", shared, "--manifest", few, "--steps", "2", "--batch-size", "4", "--rank", "2"],
        ["evaluate", shared, "--manifest", few],
    ):
        done = subprocess.run([*launch, *map(str, command)], capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("mean AUROC") + done.stdout.count("best validation AUROC") == 1
    metrics = json.loads((shared / "metrics.json").read_text())
    alone = measure(few, shared).summary
    for part in ("base", "adapted", "difference"):
        assert metrics[part] == alone[part]
