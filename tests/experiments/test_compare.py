"""The comparison of methods: which runs, what chooses, what is pooled; and the command, killed and resumed."""

import base64
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from medctkit.cli import app
from medctkit.cohort.cache import VolumeCache, content_of, key_of
from medctkit.cohort.manifest import load_manifest, write_manifest
from medctkit.experiments.compare import results as compared
from medctkit.experiments.compare import run_all as comparison
from medctkit.experiments.compare import runs as one_run
from medctkit.experiments.compare.results import Results, load_results, pooled
from medctkit.experiments.compare.run_all import compare_methods, measure_costs, read_result, result_file
from medctkit.experiments.compare.runs import BASE, GROUPS, PROBE, SETTINGS, Data, Job, jobs, run_job, tuning_jobs
from medctkit.findings import FINDINGS
from medctkit.lora.methods import METHODS
from medctkit.metrics import scores as metrics
from medctkit.model.base_model import load_mini_base
from medctkit.zero_shot.classifier import Embedded

pytestmark = pytest.mark.usefixtures("one_thread", "on_the_cpu")

TUNED = [name for name in METHODS if name not in one_run.TUNED_AS]
RATES = {name: METHODS[name].learning_rates[-1] for name in TUNED}
SPLITS = (("train", 20), ("valid", 8), ("test", 8))
TOY = replace(SETTINGS, steps=1, batch_size=4, evaluate_every=1)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """A manifest of a few studies of the target hospital, and noise in place of their prepared volumes."""
    folder = tmp_path_factory.mktemp("cohort")
    table = load_manifest(Path(__file__).parents[2] / "data_manifest.csv")
    target = table[table["hospital"] == "target"]
    rows = pd.concat([target[target["split"] == split].head(n) for split, n in SPLITS])
    write_manifest(rows, folder / "manifest.csv")
    config, cache = load_mini_base().preprocess_config, VolumeCache(folder / "prepared")
    generator = torch.Generator().manual_seed(0)
    for row in rows.to_dict("records"):
        noise = torch.rand(1, *config.shape, generator=generator) * 2 - 1
        cache.save(key_of(row, content_of(row), config), noise)
    return folder


# --- which runs -----------------------------------------------------------------------------------------


def test_a_run_shared_by_two_groups_is_one_run():
    names = {job.name for job in [*tuning_jobs(METHODS), *jobs(GROUPS, 3, RATES)]}
    sizes = len(one_run.SIZES) - 1  # "all" is the run of the methods
    grids = sum(len(METHODS[name].learning_rates) - 1 for name in TUNED)  # the chosen one is seed 0 of the methods
    gradient = 3 * len(METHODS) + grids + 3 * (len(one_run.RANKS) - 1) + 3 * 2 * sizes
    assert gradient == 93
    assert len(names) == gradient + 1 + (1 + 3 * sizes)  # the base model; probes


def test_every_question_gets_its_runs():
    listed = jobs(GROUPS, 2, RATES)
    assert {job.method for job in listed if job.group == "methods"} == {BASE, PROBE, *METHODS}
    ranks = {(job.rank, job.seed): job for job in listed if job.group == "ranks"}
    assert set(ranks) == {(r, seed) for r in (1, 2, 4, 8, 16, 32, 64) for seed in (0, 1)}
    assert {job.learning_rate for job in ranks.values()} == {RATES["lora"]}
    assert {job.learning_rate for job in listed if job.method in ("dora", "lora-text")} == {RATES["lora"]}
    sizes = {(job.method, job.studies) for job in listed if job.group == "studies"}
    assert sizes == {(m, n) for m in ("lora", "full", PROBE) for n in (16, 32, 64, 128, 256, 512, None)}
    assert [job.method for job in jobs(["ranks"], 1, RATES)].count(BASE) == 1


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


# --- the linear probe -----------------------------------------------------------------------------------


def embedded(n, seed, one_class=()):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, (n, 18)).astype(float)
    labels[:, list(one_class)] = 0
    x = rng.normal(size=(n, 5)) * [1, 10, 100, 1, 1] + labels[:, :5] * [2, 5, 0, 0, 0]
    return Embedded(torch.tensor(x, dtype=torch.float32), labels, np.arange(n), np.arange(n))


def test_linear_probe_is_a_logistic_regression_on_standardised_embeddings_chosen_on_validation():
    train, valid, test = embedded(60, 0), embedded(50, 1), embedded(30, 2)
    probe = one_run.linear_probe(train, valid, test, strengths=(1e-4, 1.0))
    mean, std = train.embeddings.numpy().mean(0), train.embeddings.numpy().std(0)
    found = {}
    for strength in (1e-4, 1.0):
        models = [
            LogisticRegression(C=strength).fit((train.embeddings.numpy() - mean) / std, train.labels[:, k])
            for k in range(18)
        ]
        scores = [
            np.stack([m.predict_proba((x.embeddings.numpy() - mean) / std)[:, 1] for m in models], axis=1)
            for x in (valid, test)
        ]
        found[np.mean([roc_auc_score(valid.labels[:, k], scores[0][:, k]) for k in range(18)])] = (strength, scores[1])
    best = max(found)
    assert (probe.validation_auroc, probe.strength) == (pytest.approx(best), found[best][0])
    np.testing.assert_allclose(probe.scores, found[best][1], atol=1e-4)
    assert probe.one_class == ()


def test_a_finding_of_one_class_in_training_scores_one_half_and_is_named():
    probe = one_run.linear_probe(embedded(20, 0, one_class=[3, 17]), embedded(30, 1), embedded(10, 2))
    assert probe.one_class == (FINDINGS[3], FINDINGS[17])
    assert (probe.scores[:, [3, 17]] == 0.5).all() and (probe.scores[:, 4] != 0.5).all()
    with pytest.raises(ValueError, match="no finding has both positive and negative studies in the validation data"):
        one_run.linear_probe(embedded(20, 0), embedded(30, 1, one_class=range(18)), embedded(10, 2))


# --- one run, and the files of all ----------------------------------------------------------------------


@pytest.mark.parametrize("method", [BASE, PROBE, "bitfit"])
def test_a_run_says_what_it_scored_and_what_that_took(cohort, tmp_path, method):
    data = Data.load(cohort / "manifest.csv", cohort / "prepared")
    job = Job("studies", method, studies=None if method == BASE else 16, learning_rate=1e-3)
    found = run_job(job, data, TOY, tmp_path)
    scores = np.frombuffer(base64.b64decode(found["scores"]), "<f4").reshape(-1, 18)
    labels = np.array([[row[name] for name in FINDINGS] for row in data.test.rows])
    both = [k for k in range(18) if 0 < labels[:, k].mean() < 1]
    expected = {FINDINGS[k]: roc_auc_score(labels[:, k], scores[:, k]) for k in both}
    assert found["auroc"]["mean"]["value"] == pytest.approx(np.mean(list(expected.values())))
    assert {name: found["auroc"][name]["value"] for name in expected} == pytest.approx(expected)
    assert all(found["auroc"][name]["value"] is None for name in set(FINDINGS) - set(expected))
    trainable = {BASE: 0, PROBE: 97 * (18 - len(found["one_class"])), "bitfit": 4100}[method]
    assert found["trainable"] == trainable
    assert found["adapter_bytes"] - 4 * trainable in range(20_000 if method == "bitfit" else 1)
    assert 0 <= found["validation_auroc"] <= 1 and found["seconds"] > 0
    json.dumps(found, allow_nan=False)


def test_draws_of_two_scores_are_of_the_same_resamples():
    rng = np.random.default_rng(0)
    labels, scores, patients = rng.integers(0, 2, (40, 18)), rng.random((40, 18)), np.arange(40) // 2
    better = scores**2 * labels
    difference = metrics.mean_draws(labels, better, patients) - metrics.mean_draws(labels, scores, patients)
    compared_mean = metrics.compare(labels, scores, better, patients).loc["mean"]
    ends = [difference[0], np.percentile(difference[1:], 97.5)]
    assert ends == pytest.approx([compared_mean["auroc"], compared_mean["auroc_high"]])


def write_result(folder, job, **content):
    path = result_file(folder, job)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def test_learning_rates_are_chosen_by_validation_once_the_whole_grid_is_there(tmp_path):
    grid = tuning_jobs(["dora"])
    assert [job.method for job in grid] == ["lora"] * 3

    def chosen():
        return comparison._rates(tmp_path, ["dora"])

    for job, test in zip(grid[:2], (0.6, 0.9), strict=True):
        write_result(tmp_path, job, settings={}, validation_auroc=0.7, test=test)
    assert chosen() == {}
    write_result(tmp_path, grid[2], settings={}, validation_auroc=0.6, test=0.99)
    assert chosen() == {"lora": grid[0].learning_rate}, "of equals, the lower rate"
    write_result(tmp_path, grid[0], settings={}, diverged="loss is nan")
    assert chosen() == {"lora": grid[1].learning_rate}, "what diverges is left out, and ends nothing"
    for job in grid:
        write_result(tmp_path, job, settings={}, diverged="loss is nan")
    with pytest.raises(ValueError, match="lora diverged with every learning rate of its grid"):
        chosen()


def test_a_run_that_diverges_says_so(cohort, tmp_path):
    data = Data.load(cohort / "manifest.csv", cohort / "prepared")
    found = run_job(
        Job("learning-rates", "full", learning_rate=1e12), data, replace(SETTINGS, steps=5, batch_size=4), tmp_path
    )
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


def test_settings_hold_what_a_result_depends_on(cohort):
    inputs = one_run.inputs_of(cohort / "manifest.csv")
    found = one_run.settings_of(Job("studies", "lora", 16, studies=16, learning_rate=1e-3), SETTINGS, inputs)
    expected = {"steps": 100, "batch_size": 16, "evaluate_every": 25, "weight_decay": 0.01, "prompt_weight": 1.0}
    assert expected.items() <= found.items() and set(inputs) < set(found)
    assert set(one_run.settings_of(Job("methods", BASE), SETTINGS, inputs)) == {"base", "manifest"}
    json.dumps(found)


KILLED = """
import os, sys
from medctkit.experiments.compare import run_all as comparison, runs as one_run
one_run.RANKS = (1, 16)
os.cpu_count = lambda: 1  # tensors this small lose time to threads that wait for each other
if __name__ == "__main__":
    toy = comparison.FineTuneConfig(steps=1, batch_size=4, evaluate_every=1)
    comparison.compare_methods(sys.argv[1], sys.argv[2], ["ranks"], 1, toy, 1, sys.argv[3])
"""


@pytest.mark.slow
def test_a_killed_comparison_goes_on_where_it_was(cohort, tmp_path, monkeypatch, capsys):
    out, script = tmp_path / "out", tmp_path / "run.py"
    script.write_text(KILLED)
    arguments = [str(cohort / "manifest.csv"), str(out), str(cohort / "prepared")]
    process = subprocess.Popen([sys.executable, str(script), *arguments], stderr=subprocess.DEVNULL)
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

    monkeypatch.setattr(one_run, "RANKS", (1, 16))
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    compare_methods(arguments[0], out, ["ranks"], 1, TOY, 1, arguments[2])
    said = capsys.readouterr().out
    assert f"5 runs, {len(first)} of them there; about" in said
    assert all(path.stat().st_mtime_ns == at for path, at in first.items())
    assert len(list(out.glob("runs/*.json"))) == 5 and not (out / "work").exists()
    assert not [path for path in out.rglob("*.tmp") if path not in first]

    results = load_results(out)
    assert sorted(results.draws) == sorted(path.stem for path in out.glob("runs/*.json"))
    counts = {"learning-rates": 3, "methods": 2, "ranks": 2, "studies": 1}
    assert results.runs.groupby("group").size().to_dict() == counts
    shared = results.runs[results.runs["method"] == "lora"].groupby("name")["group"].agg(set)
    assert set(counts) in list(shared), "rank 16 with all studies is a run of four groups"
    with pytest.raises(ValueError, match="steps: 1 there, 2 here"):
        compare_methods(arguments[0], out, ["ranks"], 1, replace(TOY, steps=2), 1, arguments[2])
    assert len(list(out.glob("runs/*.json"))) == 5


def test_costs_are_relative_to_full_fine_tuning(cohort, monkeypatch):
    monkeypatch.setattr(comparison, "METHODS", {name: METHODS[name] for name in ("full", "lora", "bitfit")})
    data = Data.load(cohort / "manifest.csv", cohort / "prepared")
    table = measure_costs(data.train, TOY, repeats=1).set_index("method")
    assert table.loc["full", ["seconds_per_step_of_full", "peak_bytes_of_full"]].tolist() == [1, 1]
    weights = 4 * METHODS_FULL
    assert table.loc["full", "peak_bytes"] > 4 * weights, "weights, gradients and two averages"
    assert table.loc["lora", "peak_bytes"] < table.loc["full", "peak_bytes"] - 2 * weights
    assert (table["seconds_per_step"] > 0).all() and (table["batch_size"] == 4).all()


METHODS_FULL = 1_522_981  # parameters of the mini base model


# --- tables and figures ---------------------------------------------------------------------------------


def hand_made(costs=True):
    """Two methods with two seeds each, and three resamples one can add up in the head."""
    draws = {
        "base": [0.50, 0.40, 0.50, 0.60],
        "lora-0": [0.60, 0.50, 0.60, 0.70],
        "lora-1": [0.70, 0.60, 0.60, 0.80],
        "full-0": [0.65, 0.65, 0.65, 0.65],
        "probe": [0.62, 0.52, 0.62, 0.72],
    }
    rows = [("methods", "base", BASE, np.nan, 0, np.nan, 0)]
    rows += [("methods", f"lora-{seed}", "lora", 16, 1301, 3e-3, seed) for seed in (0, 1)]
    rows += [("ranks", "lora-0", "lora", 16, 1301, 3e-3, 0), ("ranks", "lora-1", "lora", 8, 1301, 3e-3, 0)]
    rows += [("methods", "full-0", "full", np.nan, 1301, 1e-3, 0), ("methods", "probe", PROBE, np.nan, 1301, np.nan, 0)]
    rows += [("studies", "lora-0", "lora", 16, 16, 3e-3, 0), ("studies", "lora-1", "lora", 16, 1301, 3e-3, 0)]
    runs = pd.DataFrame(rows, columns=["group", "name", "method", "rank", "studies", "learning_rate", "seed"])
    trainable = {BASE: 0, "lora": 50, "full": 1000, PROBE: 20}
    runs["trainable"] = runs["method"].map(trainable)
    runs["adapter_bytes"], runs["validation_auroc"] = 4 * runs["trainable"], 0.6
    table = pd.DataFrame({"method": ["full", "lora"], "seconds_per_step": [2.0, 1.5], "peak_bytes": [4e6, 1e6]})
    table["seconds_per_step_of_full"], table["peak_bytes_of_full"] = [1, 0.75], [1, 0.25]
    return Results(runs, {name: np.array(values) for name, values in draws.items()}, table if costs else table[:0])


def test_seeds_are_averaged_within_each_resample():
    row = pooled(hand_made(), "methods").set_index("method").loc["lora"]
    # means of the two seeds: 0.65 on the data, then 0.55, 0.60, 0.75
    assert row["auroc"] == pytest.approx(0.65) and row["seeds"] == 2
    assert [row["auroc_low"], row["auroc_high"]] == pytest.approx(np.percentile([0.55, 0.60, 0.75], [2.5, 97.5]))
    # minus the base model in the same resample: 0.15, 0.10, 0.15
    assert row["over_base"] == pytest.approx(0.15)
    assert [row["over_base_low"], row["over_base_high"]] == pytest.approx(
        np.percentile([0.15, 0.10, 0.15], [2.5, 97.5])
    )
    assert row["auroc_sd"] == pytest.approx(0.1 / np.sqrt(2))


def test_method_table_has_a_row_for_each_method_base_first():
    table = compared.method_table(hand_made())
    assert table["method"].tolist() == [BASE, PROBE, "full", "lora"]
    assert table["zero_shot"].tolist() == [True, False, True, True]
    assert table["trainable_share"].tolist() == [0, 0.02, 1, 0.05]
    assert table["peak_bytes_of_full"].fillna(-1).tolist() == [-1, -1, 1, 0.25]
    assert "knows these 18 answers only" in table.loc[1, "trains"]
    assert table["paper"].str.contains("arXiv").tolist() == [False, True, True, True]


def test_shown_table_says_what_is_not_zero_shot_and_what_the_interval_is():
    text = compared.show(compared.method_table(hand_made()))
    lines = text.splitlines()
    assert "linear probe (not zero-shot)" in lines[2]
    assert "0.650 [0.552, 0.742]" in lines[4] and "+0.150 [+0.102, +0.150]" in lines[4] and "0.75" in lines[4]
    assert "bootstrap over test patients" in lines[-1] and "Phantom" in lines[-1]
    assert "-" in compared.show(compared.method_table(hand_made(costs=False))).splitlines()[4]


def test_figures_show_intervals_labels_and_the_base_model(tmp_path):
    results = hand_made()
    for figure, words in (
        (compared.figure_methods(results), "trainable parameters"),
        (compared.figure_studies(results), "studies"),
    ):
        (axes,) = figure.axes
        assert axes.get_xscale() == "log" and words in axes.get_xlabel() and "Phantom" in axes.get_title()
        base = axes.lines[0]
        assert base.get_linestyle() == "--" and list(base.get_ydata()) == [0.5, 0.5]
    methods = compared.figure_methods(results).axes[0]
    assert {text.get_text() for text in methods.texts} == {"r=8", "r=16"}
    named = [text.get_text() for text in methods.get_legend().get_texts()]
    expected = ["base model, 0.500", "linear probe, 0.620 (not zero-shot)", "LoRA, 0.650", "full fine-tuning, 0.650"]
    assert named == expected
    bars = sorted(tuple(np.round(path.vertices[:, 1], 3)) for c in methods.collections[1:] for path in c.get_paths())
    assert (0.552, 0.742) in bars
    line = compared.figure_studies(results).axes[0].lines[1]
    assert [list(line.get_xdata()), list(line.get_ydata())] == [[16, 1301], [0.6, 0.7]]
    written = compared.write_figures(results, tmp_path)
    assert [path.name for path in written] == ["methods.png", "studies.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in written)


def test_missing_results_say_how_to_make_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no comparison.csv; `medctkit compare .*` makes it"):
        load_results(tmp_path)
    results = hand_made()
    with pytest.raises(ValueError, match="no runs of group 'learning-rates'; there are methods, ranks, studies"):
        pooled(results, "learning-rates")


def test_the_command_refuses_what_it_does_not_know(tmp_path):
    result = CliRunner().invoke(app, ["compare", str(tmp_path), "--only", "rank"])
    assert result.exit_code == 1
    assert "unknown group 'rank'; choose from learning-rates, methods, ranks, studies" in result.output
    with pytest.raises(ValueError, match="seeds and workers must be at least 1, got 0 and 1"):
        compare_methods("data_manifest.csv", tmp_path, seeds=0)
    assert not os.listdir(tmp_path)
