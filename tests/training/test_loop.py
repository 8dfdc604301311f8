"""The settings and the loop, on a tiny model and random data."""

import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch
from several import at_once
from tiny import PROMPTS, tiny_ct_clip, tiny_data, tiny_model, tiny_tokenizer

from medctkit.lora.adapter import ADAPTER_FILE, add_lora, load_adapter
from medctkit.training import checkpoints
from medctkit.training.checkpoints import made_of
from medctkit.training.loop import finetune, learning_rate_factor
from medctkit.training.settings import FineTuneConfig

pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def settings(**changes):
    return FineTuneConfig(**({"steps": 4, "batch_size": 4, "prompts": PROMPTS, "evaluate_every": 2} | changes))


def run(tokenizer, path, model=None, data=None, score_fn=lambda model: 0.5, callback=None, **changes):
    model, data = model or tiny_model(), data or tiny_data()
    return model, finetune(model, data, tokenizer, settings(**changes), path, score_fn, callback)


def test_learning_rate_rises_then_falls_along_a_cosine():
    factors = [learning_rate_factor(step, 20, 0.2) for step in range(20)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[12] == pytest.approx(0.5) and factors[4] == 1.0
    assert factors[4:] == sorted(factors[4:], reverse=True) and 0 < factors[-1] < 0.02


# --- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": None}, "give either steps or epochs, got steps=None and epochs=None"),
        ({"epochs": 2}, "give either steps or epochs, got steps=4 and epochs=2"),
        ({"steps": 0}, "FineTuneConfig.steps must be at least 1, got 0"),
        ({"steps": None, "epochs": math.inf}, "FineTuneConfig.epochs must be a number above 0, got inf"),
        ({"micro_batch_size": 3}, "FineTuneConfig.micro_batch_size must be None or a divisor of batch_size 4, got 3"),
        ({"workers": -1}, "FineTuneConfig.workers must be at least 0, got -1"),
        ({"seed": -1}, "FineTuneConfig.seed must be from 0 to 2"),
        ({"checkpoint_every": 0}, "FineTuneConfig.checkpoint_every must be at least 1, got 0"),
        ({"learning_rate": -1e-3}, "FineTuneConfig.learning_rate must be a number above 0, got -0.001"),
        ({"learning_rate": math.nan}, "FineTuneConfig.learning_rate must be a number above 0, got nan"),
        ({"warmup_fraction": 1.0}, "FineTuneConfig.warmup_fraction must be at least 0 and below 1, got 1.0"),
        (
            {"mixed_precision": "fp8"},
            "FineTuneConfig.mixed_precision must be 'no', 'bf16', 'fp16' or 'auto', got 'fp8'",
        ),
        ({"batch_size": 1}, "batch_size must be at least 2 for the contrastive objective"),
        ({"batch_size": 1, "contrastive_weight": 0}, "got 1. Raise it, or set prevalence=True"),
        ({"contrastive_weight": 0, "prompt_weight": 0}, "are both 0: nothing to learn from; raise one"),
        ({"prompts": {}}, "none for Medical material, Arterial wall calcification"),
        (
            {"prompts": PROMPTS | {"Atelectasis": (("atelectasis is present",), ("none",))}},
            "'atelectasis is present' is a prompt of the evaluation",
        ),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        settings(**changes)


# --- the loop -----------------------------------------------------------------------------------


def test_only_the_adapter_changes_and_the_base_stays_bit_for_bit(tokenizer, tmp_path):
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scores = iter([0.1, 0.2, 0.3])
    run(tokenizer, tmp_path, model, score_fn=lambda m: next(scores))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if ".lora_" in name}


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tokenizer, tmp_path):
    runs = []
    for i, seed in enumerate((1, 1, 2)):
        model = tiny_model()
        torch.manual_seed(100 + i)  # what torch's generator did before must not matter
        runs.append(run(tokenizer, tmp_path / str(i), model, seed=seed))
    (a, first), (b, second), (_, other) = runs
    columns = ["step", "contrastive", "prompts", "loss", "learning_rate", "grad_norm"]
    assert first.history[columns].equals(second.history[columns])
    assert not first.history[columns].equals(other.history[columns])
    for (name, one), (_, two) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert torch.equal(one, two), name


def test_the_first_step_moves_by_the_warm_up_rate(tokenizer, tmp_path):
    model, moved = tiny_model(), []

    def largest_b(row):
        moved.append(max(p.abs().max().item() for n, p in model.named_parameters() if ".lora_B." in n))

    _, result = run(tokenizer, tmp_path, model, callback=largest_b, learning_rate=1e-3, warmup_fraction=0.5)
    assert result.history["learning_rate"].dropna().tolist() == pytest.approx([5e-4, 1e-3, 1e-3, 5e-4])
    # Adam's first step is the learning rate times the gradient's sign, and B starts at zero
    assert moved[:2] == [0.0, pytest.approx(5e-4, rel=1e-3)]


def test_the_loss_falls_on_data_it_can_learn(tokenizer, tmp_path):
    _, result = run(tokenizer, tmp_path, tiny_model(dropout=0.0), steps=60, learning_rate=1e-2, evaluate_every=60)
    loss = result.history["loss"]
    assert loss.iloc[-5:].mean() < loss.iloc[1:6].mean() - 0.2


def test_the_best_validation_score_decides_the_adapter(tokenizer, tmp_path):
    scores, seen, modes = iter([0.50, 0.60, 0.55]), [], []
    weights = {}

    def score_fn(model):
        modes.append((model.training, torch.is_grad_enabled()))
        weights[len(modes)] = {n: p.clone() for n, p in model.named_parameters() if ".lora_" in n}
        return next(scores)

    model, result = run(tokenizer, tmp_path, score_fn=score_fn, callback=seen.append)
    assert modes == [(False, False)] * 3
    assert (result.best_step, result.best_score) == (2, 0.60)
    assert result.history["step"].tolist() == [0, 1, 2, 3, 4] == [row["step"] for row in seen]
    assert result.history["score"].dropna().tolist() == [0.50, 0.60, 0.55]
    assert {"loss", "contrastive", "prompts", "learning_rate", "grad_norm", "seconds"} <= set(result.history)
    kept = {n: p for n, p in model.named_parameters() if ".lora_" in n}
    assert all(torch.equal(kept[name], tensor) for name, tensor in weights[2].items())
    loaded = load_adapter(tiny_model().unload(), result.adapter_dir)
    assert all(torch.equal(p, weights[2][n]) for n, p in loaded.named_parameters() if ".lora_" in n)


def test_epochs_are_counted_in_batches(tokenizer, tmp_path):
    _, result = run(tokenizer, tmp_path, steps=None, epochs=1.5)
    assert result.history["step"].iloc[-1] == 3  # 8 studies in batches of 4: two per epoch


def spoiled(data):
    data[2]["pixel_values"][0, 0, 0, 0] = math.nan
    return data


def with_infinite_gradients(model):
    next(p for n, p in model.named_parameters() if "lora_B" in n).register_hook(lambda g: g * math.inf)
    return model


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            lambda: {"data": spoiled(tiny_data(4))},
            FloatingPointError,
            "nan at step 1, studies .*study_2.*lower learn",
        ),
        (
            lambda: {"model": with_infinite_gradients(tiny_model())},
            FloatingPointError,
            r"gradient norm is (inf|nan) at step 1, studies study_\d, study_\d, study_\d, study_\d\.",
        ),
        (
            lambda: {"score_fn": lambda model: math.nan},
            ValueError,
            "score_fn returned nan at step 0; expected",
        ),
        (lambda: {"model": tiny_model().unload()}, ValueError, "no trainable adapter; make one with add_lora"),
        (lambda: {"data": tiny_data(3)}, ValueError, "3 training studies are fewer than one batch of 4"),
    ],
)
def test_what_cannot_be_trained_stops_and_says_where(tokenizer, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        run(tokenizer, tmp_path, **changes())


def test_the_silent_trap_is_caught(tokenizer, tmp_path):
    model = tiny_model()
    tower = model.get_base_model().visual_transformer
    tower.train = lambda mode=True: type(tower).train(tower, False)
    with pytest.raises(
        RuntimeError, match="no gradient reached the vision encoder's trainable parameters in the first"
    ):
        run(tokenizer, tmp_path, model)
    run(tokenizer, tmp_path, tiny_model("text"))  # nothing in the vision encoder to reach: no complaint


def test_precision_may_change_from_run_to_run(tokenizer, tmp_path):
    losses = {}
    for precision in ("no", "bf16", "no"):
        _, result = run(tokenizer, tmp_path / precision, tiny_model(dropout=0.0), mixed_precision=precision)
        losses.setdefault(precision, result.history["loss"].dropna().to_numpy())
    assert not np.array_equal(losses["no"], losses["bf16"])
    np.testing.assert_allclose(losses["bf16"], losses["no"], rtol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])  # spawn: macOS, Windows, and Linux from Python 3.14
def test_volumes_may_be_loaded_by_other_processes(tokenizer, tmp_path, monkeypatch, method):
    _, alone = run(tokenizer, tmp_path / "alone", micro_batch_size=2)
    monkeypatch.setattr(
        multiprocessing.context._default_context, "_actual_context", multiprocessing.get_context(method)
    )
    _, helped = run(tokenizer, tmp_path / "helped", micro_batch_size=2, workers=1)
    assert alone.history["loss"].equals(helped.history["loss"])


def test_tensorboard_has_every_row(tokenizer, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, result = run(tokenizer, tmp_path)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in ("loss", "contrastive", "prompts", "learning_rate", "grad_norm", "score"):
        rows = result.history[["step", name]].dropna()
        logged = board.Scalars(name)
        assert [event.step for event in logged] == rows["step"].tolist()
        assert [event.value for event in logged] == pytest.approx(rows[name].tolist(), rel=1e-6)


# --- interrupted runs ------------------------------------------------------------------------------------


def in_a_process(folder, changes):
    """A run that tells in a file how far it is."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    folder = Path(folder)
    model = tiny_model(dropout=0.2)

    def score_fn(model):
        return float(sum(p.double().abs().sum() for n, p in model.named_parameters() if "lora_B" in n)) % 0.01

    with open(folder.with_suffix(".rows"), "a") as rows:

        def tell(row):
            rows.write(json.dumps(row) + "\n")
            rows.flush()

        run(tiny_tokenizer(), folder, model, score_fn=score_fn, callback=tell, **changes)


LONG = {"steps": 120, "evaluate_every": 10, "checkpoint_every": 7}  # long after the last kill, however slow the machine


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"micro_batch_size": 2, "mixed_precision": "bf16"}])
def test_kill_9_at_any_moment_and_the_same_run_comes_out(tmp_path, more):
    def start(folder):
        process = at_once().Process(target=in_a_process, args=(str(folder), LONG | more))
        process.start()
        return process

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    start(whole).join(120)
    kills = []
    for _ in range(3):
        told, kills = parts.with_suffix(".rows"), [*kills, random.SystemRandom().randrange(1, 30)]
        before = len(told.read_text().splitlines()) if told.exists() else 0
        process = start(parts)
        while process.is_alive():
            if told.exists() and len(told.read_text().splitlines()) >= before + kills[-1]:
                process.kill()
                break
            time.sleep(0.001)
        process.join(120)
        assert process.exitcode == -signal.SIGKILL, f"ended before it could be killed after {kills}"
        assert not (parts / "history.csv").exists()
    last = start(parts)
    last.join(120)
    assert last.exitcode == 0
    history = [pd.read_csv(folder / "history.csv").drop(columns="seconds") for folder in (whole, parts)]
    pd.testing.assert_frame_equal(*history, check_exact=True, obj=f"history after kills at {kills}")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (whole / "adapter" / name).read_bytes() == (parts / "adapter" / name).read_bytes(), kills
    for folder in (whole, parts):
        assert sorted(path.name for path in folder.iterdir()) == ["adapter", "history.csv", "run.json", "tensorboard"]
        assert len(list((folder / "adapter").iterdir())) == 2


def stopped(tokenizer, path, at=3, model=None, **changes):
    """Stop a run while its step `at` is told."""

    def stop(row):
        if row["step"] == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tokenizer, path, model, callback=stop, **({"checkpoint_every": 1} | changes))
    return path / checkpoints.WORK / checkpoints.NAME


def another_base():
    model = tiny_model()
    with torch.no_grad():
        model.get_base_model().to_visual_latent.weight += 1e-3
    return model


def test_a_stopped_run_goes_on_and_tells_what_was_before(tokenizer, tmp_path):
    seen = []
    assert stopped(tokenizer, tmp_path).is_file()
    _, result = run(tokenizer, tmp_path, callback=seen.append, checkpoint_every=2, workers=1)  # which change nothing
    assert [row["step"] for row in seen] == [0, 1, 2, 3, 4] == result.history["step"].tolist()
    assert not (tmp_path / checkpoints.WORK).exists()


@pytest.mark.parametrize("interrupted", [False, True])
def test_early_stopping_counts_validations_before_an_interruption_too(tokenizer, tmp_path, interrupted):
    changes = {"steps": 20, "evaluate_every": 1, "patience": 3, "checkpoint_every": 1}
    if interrupted:
        stopped(tokenizer, tmp_path, **changes)
    _, result = run(tokenizer, tmp_path, **changes)
    assert result.history["step"].iloc[-1] == 3 and result.best_step == 0


def test_a_run_that_had_stopped_early_when_it_was_killed_goes_on(tokenizer, tmp_path, monkeypatch):
    changes = {"steps": 20, "evaluate_every": 1, "patience": 3}  # before its first checkpoint
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(checkpoints.Run, "finish", Mock(side_effect=KeyboardInterrupt))
        run(tokenizer, tmp_path, **changes)
    _, result = run(tokenizer, tmp_path, **changes)
    assert result.history["step"].iloc[-1] == 3 and checkpoints.finished_run(tmp_path)["step"] == 3


def test_what_a_kill_left_half_written_is_not_handed_on(tokenizer, tmp_path):
    half_written = stopped(tokenizer, tmp_path).with_name("adapter") / ".saving-x"
    half_written.mkdir()
    _, result = run(tokenizer, tmp_path)
    assert {path.name for path in result.adapter_dir.iterdir()} == {"adapter_config.json", ADAPTER_FILE}


def told_otherwise(name, value):
    data = tiny_data()
    data[3][name] = value(data[3][name])
    return data


def scored_on(data):
    def score(model):
        return 0.5

    score.dataset = data
    return score


OTHERS = [
    ({"learning_rate": 1e-2}, "learning_rate: 0.0005 there, 0.01 here"),
    ({"steps": 9}, "steps: 4 there, 9 here"),
    ({"seed": 1}, "seed: 0 there, 1 here"),
    ({"prompts": {f: (("seen",), ("none",)) for f in PROMPTS}}, "prompts: "),
    ({"data": tiny_data(9)}, "training studies: '8, .* there, '9, .* here"),
    ({"data": told_otherwise("labels", lambda labels: 1 - labels)}, "training studies: '8, .* there, '8, .* here"),
    ({"data": told_otherwise("report", lambda report: "scan 7")}, "training studies: "),
    ({"data": told_otherwise("pixel_values", lambda pixels: pixels / 2)}, "training studies: "),
    ({"data": torch.utils.data.Subset(tiny_data(), [1, 0, *range(2, 8)])}, "training studies: "),
    ({"score_fn": scored_on(tiny_data(2))}, "validation studies: '0, .* there, '2, .* here"),
    ({"model": tiny_model("vision")}, "trained parameters: "),
    ({"model": add_lora(tiny_ct_clip(dropout=0.1), r=4, lora_alpha=3)}, "trained parameters: "),
    ({"model": another_base()}, r"base model: '\w+' there, '\w+' here"),
]


@pytest.mark.parametrize(("changes", "message"), OTHERS)
def test_a_checkpoint_of_another_run_is_refused_and_kept(tokenizer, tmp_path, changes, message):
    file = stopped(tokenizer, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=rf"of a run that was not finished, and not this one\. Delete .*{message}"):
        run(tokenizer, tmp_path, **changes)
    assert file.is_file() and contents(tmp_path) == before


def test_studies_are_told_apart_in_any_data_set(tokenizer):
    from torch.utils.data import ConcatDataset, Subset

    def told(data):
        return made_of(tiny_model(), data, FineTuneConfig(steps=1), tokenizer, None)["training studies"]

    same, others = tiny_data(4), tiny_data(4, seed=4)
    assert told(same) == told(ConcatDataset([same])) == told(Subset(Subset([*others, *same], range(2, 8)), range(2, 6)))
    assert told(same) != told(ConcatDataset([others])) != told(ConcatDataset([tiny_data(4, seed=5)]))


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "tensorboard" not in path.parts}


@pytest.fixture(scope="module")
def ended(tokenizer, tmp_path_factory):
    """A finished run in whose adapter something was learnt."""
    folder = tmp_path_factory.mktemp("ended")
    scores = iter([0.1, 0.2, 0.3])
    os.environ["ACCELERATE_USE_CPU"] = "true"
    return run(tokenizer, folder, score_fn=lambda model: next(scores))


def test_a_finished_run_gives_its_result_again_and_nothing_is_written(tokenizer, ended):
    model, result = ended
    folder, seen = result.adapter_dir.parent, []
    before = contents(folder)
    assert {path.name for path in before} == {"adapter_config.json", ADAPTER_FILE, "history.csv", "run.json"}

    def stop(row):
        seen.append(row)
        if row["step"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tokenizer, folder, callback=stop)
    again, found = run(tokenizer, folder, score_fn=lambda model: pytest.fail("it is finished"), callback=seen.append)
    assert contents(folder) == before and len(seen) == 2 + 5
    pd.testing.assert_frame_equal(found.history, result.history, check_exact=True)
    assert (found.best_step, found.best_score, found.seconds) == (4, 0.3, result.seconds)
    states = again.state_dict(), model.state_dict()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items()) and not again.training


@pytest.mark.parametrize(("changes", "message"), OTHERS[:6:3])
def test_another_run_does_not_take_the_place_of_a_finished_one(tokenizer, ended, changes, message):
    folder = ended[1].adapter_dir.parent
    before = contents(folder)
    with pytest.raises(
        ValueError, match=rf"of a run that is finished, and not this one\. Give .* run\.json\. {message}"
    ):
        run(tokenizer, folder, **changes)
    assert contents(folder) == before


def test_a_finished_run_is_known_by_its_files(tokenizer, ended, tmp_path):
    folder = Path(shutil.copytree(ended[1].adapter_dir.parent, tmp_path / "run"))
    assert checkpoints.finished_run(folder)["best_step"] == 4
    with pytest.raises(FileNotFoundError, match="has no run.json, so no run .* was finished there$"):
        checkpoints.finished_run(tmp_path)
    stopped(tokenizer, tmp_path / "begun")
    with pytest.raises(FileNotFoundError, match="one was begun: the same command again goes on"):
        checkpoints.finished_run(tmp_path / "begun")
    shutil.copy(tmp_path / "begun" / checkpoints.WORK / "adapter" / ADAPTER_FILE, folder / "adapter")
    for look in (lambda: checkpoints.finished_run(folder), lambda: run(tokenizer, folder)):
        with pytest.raises(ValueError, match=f"{ADAPTER_FILE} is not the one that its run wrote"):
            look()
    (folder / "run.json").unlink()
    with pytest.raises(ValueError, match="adapter is there, and no run.json that says of which run"):
        run(tokenizer, folder)


def test_two_runs_do_not_work_in_one_folder(tokenizer, tmp_path):
    refused = []

    def meanwhile(row):
        if row["step"] == 1:
            with pytest.raises(ValueError, match="another process is at work in .*; wait for its end") as caught:
                run(tokenizer, tmp_path)
            refused.append(caught)

    _, result = run(tokenizer, tmp_path, callback=meanwhile)
    assert refused and len(result.history) == 5 and not (tmp_path / ".lock").exists()


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-9], lambda b: b"", lambda b: b"\xff" * len(b), lambda b: b[:-1] + bytes([b[-1] ^ 1])]
)
def test_a_damaged_checkpoint_is_told(tokenizer, tmp_path, damage):
    file = stopped(tokenizer, tmp_path)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=r"is damaged, or no checkpoint of medctkit: .* Delete .* to start over"):
        run(tokenizer, tmp_path)
