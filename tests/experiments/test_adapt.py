"""The experiment on a handful of phantoms: any base model, any hospital, one call or one command each."""

import json
import re
import subprocess
import sys
from dataclasses import asdict, fields, replace

import pandas as pd
import pytest
import torch
import typer
from typer.testing import CliRunner

from medctkit.cli import app
from medctkit.cohort.cache import VolumeCache, content_of, key_of
from medctkit.cohort.dataset import prepared_dir
from medctkit.cohort.manifest import load_manifest
from medctkit.experiments.adapt import FULL_SIZE, Adaptation, Origin, adapt
from medctkit.experiments.audit import DEFECTS
from medctkit.experiments.measure import measure
from medctkit.model import ct_clip as ctclip
from medctkit.model.base_model import FOLDER, load_base, load_mini_base
from medctkit.model.ct_clip import CTCLIPConfig, CTCLIPModel
from medctkit.training.checkpoints import Run
from medctkit.zero_shot.prompts import PROMPTS

pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.mark.slow
def test_adapt_and_measure_by_default_the_mini_model(few, quick, tmp_path):
    row, prepared = load_manifest(few).iloc[-1], VolumeCache(few.parent / "prepared")
    lacking = prepared.path(key_of(row, content_of(row), load_mini_base().preprocess_config))
    lacking.unlink()
    result = adapt(few, tmp_path, settings=quick)
    assert result.adapter_dir == tmp_path / "adapter"
    assert json.loads((tmp_path / "origin.json").read_text()) == asdict(Origin("mini", None, "target"))
    measured = measure(few, tmp_path, audit_volumes=5, resamples=30)
    found = measured.summary
    assert json.loads((tmp_path / "metrics.json").read_text()) == found
    assert found["made_with"]["data"] == "phantom"
    assert measured.adapter["vision"] == 8 and measured.adapter["text"] == 6
    assert measured.adapter["trainable"] == 55_296 * 2 // 16
    assert len(measured.retrieval) == 2 * 5 and measured.retrieval["value"].between(0, 1).all()
    assert [defect.name for defect in measured.defects][0] == "unused bootstrap"
    assert {defect.name for defect in measured.defects} == set(DEFECTS)
    assert set(measured.prompts["set"]) == set(PROMPTS) and len(measured.prompts) == 2 * len(PROMPTS)
    assert lacking.is_file() and not (tmp_path / "prepared").exists()


def test_any_base_model_is_adapted_and_measured_with_what_was_written_down(few, tmp_path, checkpoint):
    origin = Origin(str(checkpoint.parent / "folder"), str(FOLDER), None)
    settings = replace(FULL_SIZE, steps=2, batch_size=4, evaluate_every=1, workers=0, rank=2)
    result = adapt(few, tmp_path, settings=settings, origin=origin)
    assert len(result.history) == 3
    assert measure(few, tmp_path, batch_size=2, audit_volumes=2, resamples=30).made_with["data"] == "phantom"
    assert Origin.of(tmp_path) == origin


@pytest.mark.slow
def test_only_a_finished_run_is_measured_and_a_refused_command_leaves_it_as_it_is(
    few, origin, quick, tmp_path, monkeypatch
):
    def again(**changes):
        return adapt(few, tmp_path, **{"settings": quick, "origin": origin} | changes)

    with pytest.raises(FileNotFoundError, match="no run of `medctkit finetune` was finished there$"):
        measure(few, tmp_path)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Run, "save", lambda run: (_ for _ in ()).throw(KeyboardInterrupt))
        again()
    with pytest.raises(FileNotFoundError, match="one was begun"):
        measure(few, tmp_path)
    again()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for changes in ({"settings": replace(quick, learning_rate=1e-4)}, {"origin": Origin(hospital=None)}):
        with pytest.raises(ValueError, match="is of another run, and not this one|is of Origin"):
            again(**changes)
    again()
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after.keys() == before.keys()
    assert all(after[path] == content for path, content in before.items() if "tensorboard" not in str(path))
    (tmp_path / "origin.json").unlink()
    with pytest.raises(FileNotFoundError, match="origin.json is not there"):
        measure(few, tmp_path)


def test_half_precision_and_recomputed_activations_change_little(few, origin, quick, finished, tmp_path):
    plain = pd.read_csv(finished / "history.csv")
    thrifty = replace(quick, mixed_precision="bf16", gradient_checkpointing=True, micro_batch_size=2)
    small = adapt(few, tmp_path, settings=thrifty, origin=origin).history
    assert small["loss"].dropna().tolist() == pytest.approx(plain["loss"].dropna().tolist(), rel=0.1)


def test_load_base(checkpoint, tmp_path, monkeypatch):
    folder = checkpoint.parent / "folder"
    config = json.loads((folder / "config.json").read_text())
    with pytest.raises(ValueError, match="is not a CT-CLIP of these sizes"):
        load_base(checkpoint, FOLDER)
    monkeypatch.setattr(ctclip, "RELEASED_VISION", config["vision_config"])
    monkeypatch.setattr(ctclip, "RELEASED_TEXT", config["text_config"])
    released, weights = load_base(checkpoint, FOLDER), load_base(folder, FOLDER).model.state_dict()
    assert released.preprocess_config.shape == (32, 48, 48)
    assert all(torch.equal(weights[name], tensor) for name, tensor in released.model.state_dict().items())
    assert load_base().model.num_parameters() == load_mini_base().model.num_parameters()
    CTCLIPModel(CTCLIPConfig(text_config={"vocab_size": 50})).save_pretrained(tmp_path)
    for arguments, error, message in (
        ((checkpoint,), FileNotFoundError, "holds weights only; give the folder of its tokenizer too"),
        (("nowhere",), FileNotFoundError, r"nowhere: expected mini, .*a model's folder .* or a checkpoint file"),
        ((folder,), FileNotFoundError, "has no tokenizer: expected a tokenizer.json or vocab.txt"),
        (("mini", FOLDER), ValueError, "the mini model has a tokenizer of its own"),
        ((tmp_path, FOLDER), ValueError, "has 395 words, the model knows 50; it is the tokenizer of another model"),
    ):
        with pytest.raises(error, match=message):
            load_base(*arguments)


def test_where_prepared_volumes_are(few, tmp_path):
    assert prepared_dir(few, tmp_path) == few.parent / "prepared"
    assert prepared_dir(few, tmp_path, "elsewhere").name == "elsewhere"
    assert prepared_dir(tmp_path / "manifest.csv", tmp_path / "run") == tmp_path / "run" / "prepared"


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.mark.slow
def test_the_commands_adapt_measure_and_say_how_to_watch(few, origin, tmp_path, monkeypatch):
    small = ("finetune", tmp_path, "--manifest", few, "--steps", 2, "--batch-size", 4, "--rank", 2)
    small += ("--model", origin.model, "--tokenizer", origin.tokenizer)
    done = run(*small)
    assert done.exit_code == 0 and "best validation AUROC" in done.stdout
    assert f"tensorboard --logdir {tmp_path}" in done.stdout and (tmp_path / "tensorboard").is_dir()
    done = run("evaluate", tmp_path, "--manifest", few, "--audit-volumes", 0)
    assert done.exit_code == 0 and "mean AUROC" in done.stdout and "report.html" in done.stdout
    assert "a run finished after 2 steps; its adapter is of step" in done.stdout
    scores = pd.read_csv(tmp_path / "scores.csv")
    assert len(scores) == 24 * 18 and {"study", "finding", "label", "base", "adapted"} < set(scores)
    table = pd.read_csv(tmp_path / "findings.csv", index_col="finding")
    mean = json.loads((tmp_path / "metrics.json").read_text())["difference"]["auroc"]
    assert table.loc["mean", "difference auroc_low"] == pytest.approx(mean["low"], abs=1e-3)
    assert r"\begin{tabular}" in (tmp_path / "findings.tex").read_text()
    monkeypatch.setattr("accelerate.utils.is_tensorboard_available", lambda: False)
    other = tmp_path / "without"
    done = run("finetune", other, "--config", tmp_path / "run.yaml")  # the same run by its file
    assert done.exit_code == 0 and "pip install 'medctkit[tensorboard]'" in done.stdout
    assert sorted(path.name for path in other.iterdir()) == [
        "adapter", "history.csv", "origin.json", "run.json", "run.yaml",
    ]  # fmt: skip
    assert (other / "run.yaml").read_text() == (tmp_path / "run.yaml").read_text()
    histories = [pd.read_csv(folder / "history.csv").drop(columns="seconds") for folder in (tmp_path, other)]
    pd.testing.assert_frame_equal(*histories)


@pytest.mark.parametrize(("written", "option"), [("steps: 80", "epochs"), ("epochs: 80", "steps")])
def test_an_option_goes_before_the_file(tmp_path, written, option):
    file = tmp_path / "run.yaml"
    file.write_text(f"settings: {{{written}}}")
    done = run("finetune", tmp_path / "out", "--config", file, f"--{option}", 2, "--manifest", "nowhere.csv")
    assert "error: no manifest at nowhere.csv" in done.stderr and f"{option}=2" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("finetune", __file__), "is a file"),
        (("evaluate", __file__, "--base"), "is a file"),
        (("evaluate", "out", "--seed", -1), "Invalid value for '--seed'"),
    ],
)
def test_what_would_fail_in_the_end_is_refused_at_once(arguments, message):
    done = run(*arguments)
    assert done.exit_code == 2 and message in " ".join(done.stderr.replace("\u2502", "").split())


def test_a_base_model_is_measured_alone(few, origin, tmp_path):
    which = ("--hospital", "target", "--model", origin.model, "--tokenizer", origin.tokenizer)
    done = run("evaluate", tmp_path, "--base", "--manifest", few, *which)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "base.json").read_text())
    assert found["studies"] == 24 and f"mean AUROC {found['auroc']['value']:.3f}" in done.stdout
    assert not re.search(r"0\.731(?!\])", done.stdout), "that is of CT-RATE"
    scores = pd.read_csv(tmp_path / "scores.csv")
    assert scores["base"].between(0, 1).all() and "adapted" not in scores


def test_other_methods_are_adapted_and_measured_too(few, origin, quick, tmp_path):
    settings = replace(quick, method="bitfit", learning_rate=1e-3)
    assert adapt(few, tmp_path, settings=settings, origin=origin).best_step >= 0
    measured = measure(few, tmp_path, audit_volumes=0, resamples=2)
    assert measured.adapter["vision"] == 0 and measured.adapter["trainable"] > 0
    for changes, message in (
        ({"method": "lorra"}, "unknown method 'lorra'; choose one of full"),
        ({"method": "pissa"}, "'pissa' changes the base model too, so that no command could load what it trained"),
        ({"method": "dora", "preset": "vision"}, "preset 'vision' is a placement of method 'lora'"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(quick, **changes)
    scaled = replace(quick, alpha=8, dropout=0.1).apply(load_mini_base().model).peft_config["default"]
    assert (scaled.lora_alpha, scaled.lora_dropout, scaled.r) == (8, 0.1, 2)
    with pytest.raises(ValueError, match="method 'bitfit' does not know one of the settings"):
        replace(settings, alpha=8).apply(load_mini_base().model)


def test_a_folder_of_another_run_is_refused_before_anything_is_loaded(few, origin, quick, tmp_path, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Run, "finish", lambda run: (_ for _ in ()).throw(KeyboardInterrupt))
        adapt(few, tmp_path, settings=quick, origin=origin)
    monkeypatch.setattr(Origin, "load", None)  # fails when called
    with pytest.raises(ValueError, match=r"is of another run.*learning_rate: 0.003 there, 0.0001 here"):
        adapt(few, tmp_path, settings=replace(quick, learning_rate=1e-4), origin=origin)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch-size", 99), "8 training studies are fewer than one batch of 99"),
        (("--batch-size", 4, "--micro-batch-size", 3), "micro_batch_size must be None or a divisor of batch_size 4"),
        (("--steps", 4, "--epochs", 1), "give either steps or epochs"),
        (("--preset", "papre"), "unknown LoRA preset 'papre'"),
        (("--mixed-precision", "fp8"), "'auto', got 'fp8'"),
        (("--model", "nothing.pt"), "nothing.pt: expected mini"),
        (("--tracker", "wandbb"), "tracker 'wandbb' is not installed"),
        (("--config", "nowhere.yaml"), "no run file at nowhere.yaml"),
    ],
)
def test_a_command_tells_what_is_wrong_without_a_traceback(few, tmp_path, arguments, message):
    done = run("finetune", tmp_path, "--manifest", few, *arguments)
    assert done.exit_code == 1 and done.stderr.startswith("error: ") and message in done.stderr


def test_options_are_those_of_the_declaration():
    command = typer.main.get_command(app).commands["finetune"]
    options = {option.name: option for option in command.params}
    names = {field.name for field in fields(Adaptation)} - {"prompts", "seed"}
    assert names < set(options) and all(options[name].help and options[name].default is None for name in names)
    assert (
        Adaptation.help()["rank"].startswith("of the adapter") and "halved" not in Adaptation.help()["warmup_fraction"]
    )
    assert options["rank"].show_default == "16 for mini, else 24" and options["weight_decay"].show_default == "0.01"
    assert {*options["gradient_checkpointing"].opts, *options["gradient_checkpointing"].secondary_opts} == {
        "--gradient-checkpointing",
        "--no-gradient-checkpointing",
    }


@pytest.mark.slow
def test_two_processes_measure_what_one_does(few, finished):
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu"]
    launch += ["--num_machines", "1", "--num_processes", "2", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", "0", "-m", "medctkit.cli"]
    command = [*launch, "evaluate", str(finished), "--manifest", str(few), "--audit-volumes", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("mean AUROC") == 1, "one of the processes tells"
    metrics = json.loads((finished / "metrics.json").read_text())
    alone = measure(few, finished, audit_volumes=0).summary
    for part in ("base", "adapted", "difference"):
        assert metrics[part] == alone[part]
