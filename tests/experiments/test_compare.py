"""The comparison of methods: which runs, what chooses, what is pooled; and the command, killed and resumed."""

import base64
import copy
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch.utils.data import Subset
from typer.testing import CliRunner

from medctkit.cli import app
from medctkit.cohort.manifest import load_manifest
from medctkit.experiments.adapt import Origin
from medctkit.experiments.compare import run_all as comparison
from medctkit.experiments.compare import runs as one_run
from medctkit.experiments.compare.data import HELD_OUT, VARIANTS, flipped, parts, replayed
from medctkit.experiments.compare.results import load_results
from medctkit.experiments.compare.rivals import RIVALS
from medctkit.experiments.compare.run_all import collect, compare_methods, measure_costs, read_result, result_file
from medctkit.experiments.compare.runs import (
    BASE,
    DIALECTS,
    GROUPS,
    PLACEMENTS,
    PROBE,
    SETTINGS,
    SWEEP,
    Job,
    run_job,
    unpacked,
)
from medctkit.findings import FINDINGS
from medctkit.lora.methods import METHODS, apply_method
from medctkit.metrics import scores as metrics
from medctkit.model.base_model import load_mini_base
from medctkit.training.loop import finetune
from medctkit.training.objectives import joint_loss
from medctkit.zero_shot.classifier import validation_score
from medctkit.zero_shot.prompts import PROMPTS

pytestmark = pytest.mark.usefixtures("one_thread", "on_the_cpu")

TOY = replace(SETTINGS, steps=1, batch_size=4, evaluate_every=1)


# --- which runs -----------------------------------------------------------------------------------------


def nothing(job):
    """No run is there yet."""
    return None


def peaked(at):
    """Scores that are best at a learning rate."""
    return lambda job: 0.6 - abs(math.log10(job.learning_rate) - math.log10(at)) / 20


@pytest.mark.parametrize("method", ["lora", "full", "vera"])
@given(exponent=st.integers(-9, 1))
@settings(deadline=None)
def test_a_sweep_goes_on_until_its_best_lies_inside(method, exponent):
    at, tuned = float(f"{10 ** (exponent / 2):.0e}"), Job("methods", method, METHODS[method].rank).tuned
    jobs_of = {}
    for job in one_run.sweep(tuned, peaked(at)):
        jobs_of.setdefault(job.dialect, []).append(job.learning_rate)
    assert list(jobs_of) == list(DIALECTS[: 2 if method == "lora" else 1])
    for rates in jobs_of.values():
        assert set(METHODS[method].learning_rates) <= set(rates) and rates == sorted(set(rates))
        best = min(rates, key=lambda rate: abs(math.log10(rate) - math.log10(at)))
        assert rates[0] < best < rates[-1] or len(rates) == one_run.MOST_RATES
        assert len(rates) <= one_run.MOST_RATES and all(b / a < 3.5 for a, b in pairwise(rates))
    assert one_run.chosen(tuned, peaked(at)).learning_rate == best


def test_what_diverged_is_left_out_and_equals_begin_nothing():
    tuned = Job("methods", "full").tuned
    low, middle, high = METHODS["full"].learning_rates

    def of_full(score):
        return lambda job: score(job.learning_rate) if job.method == "full" else peaked(1e-2)(job)

    assert len(one_run.sweep(tuned, of_full(lambda rate: 0.6))) == one_run.MOST_RATES, "lower ones, where none learns"
    flat_at_the_end = of_full(lambda rate: 0.5 if rate < low else 0.6)
    assert one_run.chosen(tuned, flat_at_the_end).learning_rate == low, "of equals, the lowest"
    falls = {low: 0.5, middle: 0.6, high: -math.inf}
    assert one_run.chosen(tuned, of_full(falls.get)).learning_rate == middle
    assert one_run.chosen(tuned, nothing) is None and one_run.sweep(tuned, nothing) == [], "LoRA chooses the words"
    diverging = of_full(lambda rate: -math.inf if rate > low / 4 else 0.6 + rate)
    assert len(one_run.sweep(tuned, diverging)) == 6, "lower ones, and one below the best"
    with pytest.raises(ValueError, match="full.* diverged with every rate of its sweep; lower METHODS"):
        one_run.chosen(tuned, of_full(lambda rate: -math.inf))


def test_all_methods_have_the_words_that_were_chosen_for_lora():
    tuned = Job("methods", "dora", 16).tuned
    for dialect in DIALECTS:
        found = one_run.sweep(tuned, lambda job, best=dialect: peaked(3e-3)(job) + 0.1 * (job.dialect == best))
        assert {job.dialect for job in found} == {dialect}


def test_every_question_gets_its_runs_and_none_is_run_before_its_rate_is_chosen():
    of = {group: one_run.jobs(group, range(2), peaked(3e-3)) for group in GROUPS}
    own = {group: [job for job in found if job.group == group] for group, found in of.items()}
    assert {job.method for job in own["methods"]} == {BASE, PROBE, *METHODS}
    assert {job.method for job in own["rivals"]} == {BASE, *RIVALS, *PLACEMENTS, "full"}
    assert {(job.method, job.variant) for job in own["unseen"]} == {(BASE, ""), ("lora", ""), ("lora", "unseen")}
    assert {(job.rank, job.seed) for job in own["ranks"] if job.trains} == set(product(one_run.RANKS, (0, 1)))
    assert {job.variant for group in GROUPS for job in own[group]} == {"", *VARIANTS}
    sizes = {(job.method, job.studies) for job in own["studies"] if job.method != BASE}
    assert sizes == set(product(("lora", "full", PROBE, "hu-boxes"), one_run.SIZES))
    closed = Counter(job.name for job in own["rivals"] if not job.trains)
    assert set(closed.values()) == {1}, "what learns in closed form from all studies runs once"
    for group in GROUPS:
        early = one_run.jobs(group, range(2), nothing)
        assert not [job for job in early if job.trains and job.group == group]
        assumed = {job.name for job in one_run.jobs(group, range(2), nothing, assume=True)}
        assert len(assumed) >= len({job.name for job in early})
        assert [job.group for job in of[group]] == sorted((job.group for job in of[group]), key=lambda g: g == group)
    everyone = [job for found in of.values() for job in found]
    assert (
        len({job.name for job in everyone})
        == len({replace(job, group="") for job in everyone if job.method != BASE}) + 1
    )


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.data())
@settings(deadline=None, max_examples=50)
def test_small_sets_of_studies_lie_within_large_ones_and_keep_patients_together(numbers, data):
    patients = [f"patient_{i}" for i in numbers]
    n = data.draw(st.integers(1, len(patients)))
    m = data.draw(st.integers(n, len(patients)))
    small, large = (one_run.draw_studies(patients, k, seed=3) for k in (n, m))
    assert len(set(small)) == n and set(small) <= set(large)
    partly = {patients[i] for i in small} & {patients[i] for i in set(range(len(patients))) - set(small)}
    assert len(partly) <= 1, "only the last patient may be cut"


def test_studies_are_drawn_by_the_seed():
    patients = [f"patient_{i // 2}" for i in range(40)]
    first, same, other = (one_run.draw_studies(patients, 10, seed) for seed in (1, 1, 2))
    assert one_run.draw_studies(patients, None, 0) == list(range(40)) and first == same != other
    with pytest.raises(ValueError, match="41 training studies asked for, the manifest has 40; leave that size out"):
        one_run.draw_studies(patients, 41, 0)


# --- one run, and the files of all ----------------------------------------------------------------------


def test_right_labels_stay_all_flipped_are_inverted_and_of_half_nothing_is_left(data):
    item = data.train[0] | {"labels": torch.arange(18.0) % 2}
    assert torch.equal(flipped(item, 0.0, 1)["labels"], item["labels"])
    assert torch.equal(flipped(item, 1.0, 1)["labels"], 1 - item["labels"])
    assert torch.equal(flipped(item, 0.5, 1)["labels"], flipped(item, 0.5, 1)["labels"]), "the same in every epoch"
    truth = np.random.default_rng(0).integers(0, 2, (800, 18)).astype(float)
    items = [{"study": str(i), "labels": torch.from_numpy(each)} for i, each in enumerate(truth)]
    for share in (0.05, 0.5):
        wrong = np.stack([flipped(item, share, 0)["labels"].numpy() for item in items])
        assert np.mean(wrong != truth) == pytest.approx(share, abs=0.02)
        # what tells right labels apart without a fault is measured at 1 - share on wrong ones, and at chance of half
        assert metrics.mean_auroc(wrong, truth) == pytest.approx(1 - share, abs=0.02)


def test_replay_of_everything_is_joint_training(data):
    n, more = len(data.train), len(data.home)
    joint = replayed(data.train, data.home, more / (n + more))
    studies = [joint[i]["study"] for i in range(len(joint))]
    assert sorted(studies) == sorted(row["study"] for row in [*data.train.rows, *data.home.rows])
    again = replayed(data.train, Subset(data.home, range(2)), 0.5)
    assert len(again) == 2 * n, "few studies as often as makes the share"


def test_a_penalty_is_nothing_at_the_base_model_and_grows_with_what_moved(data):
    seen = data.seen(data.train)
    base = torch.stack([seen[i]["anchor"] for i in range(4)])
    batch = {"labels": torch.zeros(4, 18), "anchor": base}
    prompts = torch.nn.functional.normalize(torch.randn(36, base.shape[1]), dim=-1)
    moved = [
        joint_loss(
            torch.nn.functional.normalize(base + x, dim=-1), None, prompts, batch, torch.zeros(()), 0.0, 1.0, 2.0
        )
        for x in (0.0, 0.1, 0.3)
    ]
    values = [losses["moved"].item() for losses in moved]
    assert values[0] == pytest.approx(0, abs=1e-6) and values == sorted(values) and values[2] > 0.01
    torch.testing.assert_close(moved[2]["loss"], moved[2]["prompts"] + 2 * moved[2]["moved"])
    with pytest.raises(ValueError, match="needs its embeddings: .*anchor"):
        joint_loss(base, None, prompts, {"labels": batch["labels"]}, torch.zeros(()), 0.0, 1.0, 2.0)


@pytest.mark.slow
def test_volumes_seen_once_train_the_text_encoder_as_volumes_do(data, tmp_path):
    job = Job("placement", "lora-text", 16, learning_rate=1e-3)
    found = run_job(job, data, TOY, tmp_path / "cached")
    torch.manual_seed(0)
    model = apply_method(data.origin.load().model, "lora-text", r=16)
    config = one_run._config(job, TOY)
    score = validation_score(data.valid, data.base.tokenizer)
    result = finetune(model, data.train, data.base.tokenizer, config, tmp_path / "plain", score)
    assert found["history"] == [
        [step, pytest.approx(value)] for step, value in result.history[["step", "score"]].values
    ]


@pytest.mark.parametrize("variant", ["prevalence", "contrastive", "unseen", "noise-20", "replay", "anchor-1"])
def test_every_variant_trains(data, tmp_path, monkeypatch, variant):
    monkeypatch.setitem(vars(data), "replay", data.home)
    found = run_job(Job("forgetting", "lora", 16, learning_rate=1e-3, variant=variant), data, TOY, tmp_path)
    assert len(found["history"]) == 2 and not [name for name in found["scores"] if "strength" in name]


def test_each_loss_is_another():
    jobs_of = [Job("loss", "lora", 16, variant=variant) for variant in ("", "prevalence", "contrastive")]
    plain, prevalence, contrastive = (one_run.settings_of(job, SETTINGS, {}) for job in jobs_of)
    assert prevalence == plain | {"prevalence": True} and not plain["prevalence"]
    assert contrastive == plain | {"contrastive_weight": 1.0} and not plain["contrastive_weight"]


def test_a_sweep_leaves_test_studies_alone_and_its_best_run_is_not_trained_again(data, tmp_path, monkeypatch):
    swept = run_job(Job(SWEEP, "bitfit", learning_rate=1e-2), data, TOY, tmp_path)
    assert swept["validation_auroc"] and not {"scores", "auroc", "home", "calibration_error"} & set(swept)
    monkeypatch.setattr(comparison.torch.Tensor, "backward", None)  # a step would fail
    found = run_job(Job("methods", "bitfit", learning_rate=1e-2), data, TOY, tmp_path)
    assert {key: found[key] for key in swept if key != "seconds"} == {k: v for k, v in swept.items() if k != "seconds"}
    assert set(unpacked(found["scores"])) == {*PROMPTS, "home"}


@pytest.mark.parametrize("method", [BASE, PROBE, "bitfit"])
def test_a_run_says_what_it_scored_and_what_that_took(data, tmp_path, method):
    job = Job("studies", method, studies=None if method == BASE else 8, learning_rate=1e-3)
    found = run_job(job, data, TOY, tmp_path)
    scores = unpacked(found["scores"])
    assert set(scores) == ({"paper"} if method == PROBE else {*PROMPTS, "home"})
    for where, split, said in ((found, "test", scores["paper"]), (found.get("home"), "home", scores.get("home"))):
        if where is None:
            continue
        labels = data.labels(split)
        both = [k for k in range(18) if 0 < labels[:, k].mean() < 1]
        expected = {FINDINGS[k]: roc_auc_score(labels[:, k], said[:, k]) for k in both}
        assert where["auroc"]["mean"]["value"] == pytest.approx(np.mean(list(expected.values())))
        assert {name: where["auroc"][name]["value"] for name in expected} == pytest.approx(expected)
        assert all(where["auroc"][name]["value"] is None for name in set(FINDINGS) - set(expected))
        assert 0 < where["calibration_error"]["mean"]["value"] < 1
    model = data.base.model
    biases = sum(p.numel() for name, p in model.named_parameters() if name.endswith(".bias"))
    of_probe = (model.config.projection_dim + 1) * (18 - len(found["one_class"]))
    trainable = {BASE: 0, PROBE: of_probe, "bitfit": biases}[method]
    assert found["trainable"] == trainable
    assert found["adapter_bytes"] - 4 * trainable in range(20_000 if method == "bitfit" else 1)
    assert 0 <= found["validation_auroc"] <= 1 and found["seconds"] > 0
    json.dumps(found, allow_nan=False)


def test_scores_of_a_list_of_your_own_are_unpacked_by_its_length(monkeypatch):
    monkeypatch.setattr(one_run, "FINDINGS", ("Rib fracture", "Scoliosis", "Cyst"))
    scores = np.arange(36, dtype="<f4").reshape(12, 3)
    packed = {"paper": base64.b64encode(scores.tobytes()).decode()}
    np.testing.assert_array_equal(unpacked(packed)["paper"], scores)


def test_collected_draws_are_those_of_the_metrics(data, tmp_path):
    for job in (Job("methods", BASE), Job("rivals", "linear-probe")):
        found = run_job(job, data, TOY, tmp_path) | {"made_with": comparison.made_with(0), "settings": {}}
        keys = ("method", "rank", "studies", "learning_rate", "dialect", "variant", "seed")
        write_result(tmp_path, job, **found | {key: getattr(job, key) for key in keys})
    lost = next(job for job in one_run.GROUPS["studies"] if job.method == "hu-boxes")
    asked = {key: getattr(lost, key) for key in keys}
    write_result(tmp_path, lost, diverged="loss is nan", settings={}, made_with=comparison.made_with(0), **asked)
    collect(tmp_path, data.test.rows, data.home.rows, 1)
    (row,) = load_results(tmp_path).diverged.to_dict("records")
    assert (row["name"], row["studies"], row["variant"], row["diverged"]) == (
        lost.name,
        lost.studies,
        "",
        "loss is nan",
    )
    results, scores = load_results(tmp_path), unpacked(read_result(tmp_path, Job("methods", BASE))["scores"])
    labels, patients = one_run.truth(data.test.rows)
    held_out = [FINDINGS.index(name) for name in HELD_OUT]
    expected = {
        "base": metrics.mean_draws(labels, scores["paper"], patients),
        "base/home": metrics.mean_draws(data.labels("home"), scores["home"], one_run.truth(data.home.rows)[1]),
        "base/seen/ensemble": metrics.mean_draws(
            np.delete(labels, held_out, 1), np.delete(scores["ensemble"], held_out, 1), patients, findings=range(14)
        ),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(results.draws[name], values, atol=1e-6, err_msg=name)
    single = metrics.evaluate(labels, scores["paper"], patients)["auroc"][:-1]
    np.testing.assert_allclose(results.draws["base/findings"][0], single, atol=1e-3)
    assert {name for name in results.draws if name.startswith("linear-probe")} == {"linear-probe-all-studies-seed0"}
    row = results.runs.set_index(["group", "method"]).loc[("rivals", BASE)]
    assert row["home_auroc"] == pytest.approx(expected["base/home"][0])


def test_wrong_test_labels_are_the_same_for_all_runs():
    rng = np.random.default_rng(0)
    said, truth = {"paper": rng.random((40, 18))}, (rng.integers(0, 2, (40, 18)).astype(float), np.arange(40))
    jobs = Job("", BASE), Job("", "lora", seed=3)
    one, other = (comparison._draws(job, {"noise"}, said, {"test": truth}) for job in jobs)
    np.testing.assert_array_equal(one["base/flipped 20"], other["lora-all-studies-seed3/flipped 20"])
    assert (one["base/flipped 20"] != one["base"]).any()


def write_result(folder, job, **content):
    path = result_file(folder, job)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def test_rates_are_chosen_by_validation_alone(tmp_path):
    tuned = Job("methods", "lora", 16).tuned
    score = comparison._Scores(tmp_path)
    for dialect, rate in product(DIALECTS, METHODS["lora"].learning_rates):
        assert one_run.chosen(tuned, score) is None
        i = METHODS["lora"].learning_rates.index(rate)
        found = {"diverged": "loss is nan"} if i == 2 else {"validation_auroc": 0.6 + i / 100, "auroc": 1 - i}
        write_result(tmp_path, replace(tuned, learning_rate=rate, dialect=dialect), settings={}, **found)
    assert one_run.chosen(tuned, score).learning_rate == METHODS["lora"].learning_rates[1], "whatever test studies say"


def test_a_rate_that_diverged_is_known_to_have_been_tried(tmp_path):
    for rate, found in ((1e-3, {"validation_auroc": 0.6, "one_class": []}), (3e-3, {"diverged": "loss is nan"})):
        job = Job(SWEEP, "lora", 16, learning_rate=rate)
        write_result(tmp_path, job, **found, **vars(job), settings={}, made_with=comparison.made_with(0))
    collect(tmp_path, [], [], 1)
    swept = load_results(tmp_path).runs.set_index("learning_rate")["validation_auroc"]
    assert swept[1e-3] == 0.6 and np.isnan(swept[3e-3])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_other_strengths_lie_on_a_line_from_the_base_model(data, tmp_path, monkeypatch, method):
    monkeypatch.setattr(one_run, "STRENGTHS", (0.0, 1.0))
    job = Job("forgetting", method, METHODS[method].rank, learning_rate=1e-2)
    found = run_job(job, data, TOY, tmp_path)
    scores, base = unpacked(found["scores"]), unpacked(run_job(Job("", BASE), data, TOY, tmp_path)["scores"])
    np.testing.assert_array_equal(scores["strength 0"], base["paper"])
    np.testing.assert_array_equal(scores["strength 0/home"], base["home"])
    np.testing.assert_allclose(scores["strength 1"], scores["paper"], atol=1e-5)
    assert found["best_step"] == 0 or not np.allclose(scores["paper"], base["paper"])
    assert 0 <= found["intruders"] <= 10


def test_a_run_that_diverges_says_so(data, tmp_path):
    found = run_job(Job(SWEEP, "full", learning_rate=1e12), data, replace(SETTINGS, steps=5, batch_size=4), tmp_path)
    assert found.keys() == {"diverged"} and "at step" in found["diverged"]


def test_a_result_of_other_settings_is_refused_and_the_difference_named(tmp_path):
    job, inputs = Job("ranks", "lora", 4, learning_rate=1e-3), {"base": "b", "manifest": "m"}
    made_of = one_run.settings_of(job, TOY, inputs)
    assert read_result(tmp_path, job, made_of) is None
    write_result(tmp_path, job, settings=made_of)
    assert read_result(tmp_path, job, made_of)
    other = one_run.settings_of(job, replace(TOY, steps=7), inputs | {"manifest": "n"})
    expected = "lora-r4-all-studies-lr0.001-seed0.json was made with other settings; .*"
    with pytest.raises(ValueError, match=expected + "manifest: 'm' there, 'n' here; steps: 1 there, 7 here"):
        read_result(tmp_path, job, other)
    result_file(tmp_path, job).write_text("{half")
    with pytest.raises(ValueError, match="json is no result of this command .*; delete it to do that run again"):
        read_result(tmp_path, job, other)


def test_settings_hold_what_a_result_depends_on(toy_cohort):
    inputs = one_run.inputs_of(toy_cohort / "manifest.csv", load_mini_base(), Origin(), "source")
    found = one_run.settings_of(Job("studies", "lora", 16, studies=16, learning_rate=1e-3), SETTINGS, inputs)
    expected = {"steps": SETTINGS.steps, "batch_size": 16, "rate_of_b": 1.0, "weight_decay": 0.01, "prompt_weight": 1.0}
    assert expected.items() <= found.items() and set(inputs) < set(found)
    assert set(one_run.settings_of(Job("methods", BASE), SETTINGS, inputs)) == set(inputs)
    plus = one_run.settings_of(
        Job("forgetting", "lora+", 16, learning_rate=1e-3, variant="anchor-10"), SETTINGS, inputs
    )
    assert (plus["rate_of_b"], plus["anchor_weight"]) == (16, 10)
    for name, rival in RIVALS.items():
        own = one_run.settings_of(Job("rivals", name), SETTINGS, inputs)
        assert len(own) > 2 and rival.settings.items() <= own.items(), "what it is, not only of which studies"
        json.dumps(own)
    json.dumps(found)


def test_a_manifest_of_ones_own_names_its_hospitals(data, toy_cohort):
    table = load_manifest(toy_cohort / "manifest.csv")
    table["hospital"] = table["hospital"].map({"target": "Ours", "source": "Theirs"})
    found = parts(table, Origin(hospital="Ours"), "Theirs")
    assert [len(rows) for rows in found] == [12, 8, 8, 6]
    expected = "no train studies of hospital 'target'; its hospitals are Ours, Theirs"
    with pytest.raises(ValueError, match=expected):
        parts(table, Origin(), "source")

    elsewhere = copy.copy(data.home)
    elsewhere.rows = [row | {"hospital": "Theirs"} for row in data.home.rows]
    with pytest.raises(ValueError, match="no training studies of hospital Theirs"):
        assert replace(data, home=elsewhere).replay
    further = pd.DataFrame(data.train.rows)
    assert len(replace(data, home=elsewhere, further=further).replay) == len(further)


KILLED = """
import os, sys
from medctkit.experiments.compare import run_all as comparison, runs as one_run
one_run.GROUPS["ranks"] = [one_run.Job("ranks", "base"), *(one_run.Job("ranks", "lora", rank) for rank in (1,))]
one_run.MOST_RATES = 3
os.cpu_count = lambda: 1  # tensors this small lose time to threads that wait for each other
if __name__ == "__main__":
    toy = one_run.replace(one_run.SETTINGS, steps=1, batch_size=4, evaluate_every=1)
    origin = comparison.Origin(*sys.argv[4:], "target")
    comparison.compare_methods(sys.argv[1], sys.argv[2], ["ranks"], 1, toy, 1, sys.argv[3], origin)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_comparison_goes_on_where_it_was(toy_cohort, origin, tmp_path, monkeypatch, capsys):
    out, script = tmp_path / "out", tmp_path / "run.py"
    script.write_text(KILLED)
    arguments = [str(toy_cohort / "manifest.csv"), str(out), str(toy_cohort / "prepared")]
    base = [origin.model, origin.tokenizer]
    process = subprocess.Popen([sys.executable, str(script), *arguments, *base], stderr=subprocess.DEVNULL)
    while not list(out.glob("runs/*.json")):
        assert process.poll() is None
        time.sleep(0.05)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = {path: path.stat().st_mtime_ns for path in out.glob("runs/*.json")}
    for _ in range(200):
        if not any(Path("/proc", pid).exists() for pid in workers):
            break
        time.sleep(0.05)
    else:
        pytest.fail("a worker outlived the command")
    assert len(workers) >= 1 and not list(out.glob("comparison.csv"))

    monkeypatch.setitem(GROUPS, "ranks", [Job("ranks", BASE), *(Job("ranks", "lora", rank) for rank in (1,))])
    monkeypatch.setattr(one_run, "MOST_RATES", 3)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    compare_methods(arguments[0], out, ["ranks"], 1, TOY, 1, arguments[2], origin)
    said = capsys.readouterr().out
    assert f"10 runs, {len(first)} of them there" in said and "a step of 4 volumes takes" in said
    assert all(path.stat().st_mtime_ns == at for path, at in first.items())
    assert len(list(out.glob("runs/*.json"))) == 10 and not (out / "work").exists()
    assert not [path for path in out.rglob("*.tmp") if path not in first]

    results = load_results(out)
    measured = {name for name in results.draws if "/" not in name}  # of a sweep, the run of the best rate
    assert measured < {path.stem for path in out.glob("runs/*.json")} and len(measured) == 2
    assert [group for group in GROUPS if results.has(group)] == ["ranks"]
    with pytest.raises(ValueError, match="steps: 1 there, 2 here"):
        compare_methods(arguments[0], out, ["ranks"], 1, replace(TOY, steps=2), 1, arguments[2], origin)
    assert len(list(out.glob("runs/*.json"))) == 10


@pytest.mark.slow
def test_costs_are_relative_to_full_fine_tuning(data, monkeypatch):
    monkeypatch.setattr(comparison, "METHODS", {name: METHODS[name] for name in ("full", "lora", "bitfit")})
    table = measure_costs(data.train, TOY, repeats=1, origin=data.origin).set_index("method")
    assert table.loc["full", ["seconds_per_step_of_full", "peak_bytes_of_full"]].tolist() == [1, 1]
    weights = 4 * data.base.model.num_parameters()
    assert table.loc["full", "peak_bytes"] > 4 * weights, "weights, gradients and two averages"
    assert table.loc["lora", "peak_bytes"] < table.loc["full", "peak_bytes"] - 2 * weights
    assert (table["seconds_per_step"] > 0).all() and (table["batch_size"] == 4).all()


def test_the_home_folder_is_found(toy_cohort, origin, tmp_path, monkeypatch):
    (tmp_path / "cohort").symlink_to(toy_cohort)
    result = result_file(tmp_path / "out", replace(one_run.LORA, learning_rate=METHODS["lora"].learning_rates[0]))
    result.parent.mkdir(parents=True)
    result.write_text('{"settings": {}}')
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match=f"^{result} was made with other settings"):
        compare_methods("~/cohort/manifest.csv", "~/out", ["ranks"], seeds=1, origin=origin)


def test_the_command_refuses_what_it_does_not_know(tmp_path):
    result = CliRunner().invoke(app, ["compare", str(tmp_path), "--only", "rank"])
    assert result.exit_code == 1
    assert "unknown group 'rank'; choose from rivals, loss, unseen, placement, methods, forgetting" in result.output
    with pytest.raises(ValueError, match="seeds and workers must be at least 1, got 0 and 1"):
        compare_methods("data_manifest.csv", tmp_path, seeds=0)
    assert not os.listdir(tmp_path)
