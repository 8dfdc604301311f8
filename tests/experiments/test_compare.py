"""The comparison of methods: which runs, what chooses, what is pooled; and the command, killed and resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from medctkit.cli import app
from medctkit.experiments.compare import run_all as comparison
from medctkit.experiments.compare import runs as one_run
from medctkit.experiments.compare.data import HELD_OUT, Data
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
    Job,
    jobs,
    run_job,
    tuned_for,
    tuning_jobs,
    unpacked,
)
from medctkit.findings import FINDINGS
from medctkit.lora.methods import METHODS
from medctkit.metrics import scores as metrics
from medctkit.zero_shot.prompts import PROMPTS

pytestmark = pytest.mark.usefixtures("one_thread", "on_the_cpu")

TUNED = tuned_for()
CHOSEN = {name: (METHODS[name.removesuffix("-unseen")].learning_rates[-1], DIALECTS[0]) for name in TUNED}
TOY = replace(SETTINGS, steps=1, batch_size=4, evaluate_every=1)


@pytest.fixture(scope="module")
def data(toy_cohort):
    return Data.load(toy_cohort / "manifest.csv", toy_cohort / "prepared")


# --- which runs -----------------------------------------------------------------------------------------


def test_a_run_shared_by_two_groups_is_one_run():
    names = {job.name for job in [*tuning_jobs(TUNED), *jobs(GROUPS, 3, CHOSEN)]}
    sizes = len(one_run.SIZES) - 1  # "all" is the run of the methods
    grids = [len(METHODS[job.method].learning_rates) for job in tuning_jobs(TUNED)]
    tuning = len(grids) - len(TUNED)  # the chosen one is seed 0 of the method
    gradient = tuning + 3 * len(TUNED) + 3 * (len(one_run.RANKS) - 1) + 3 * 2 * sizes
    assert len(names) == gradient + 1 + len(RIVALS) + 3 * sizes  # the base model; rivals, probes of few studies


def test_each_encoder_has_its_own_rate_and_dialect_and_so_has_what_is_held_out():
    grid = [job for job in tuning_jobs(TUNED) if job.tuned in (*PLACEMENTS, "lora-unseen")]
    for name in (*PLACEMENTS, "lora-unseen"):
        mine = {(job.learning_rate, job.dialect) for job in grid if job.tuned == name}
        rates = METHODS[name.removesuffix("-unseen")].learning_rates
        assert mine == {(rate, dialect) for rate in rates for dialect in DIALECTS}
    assert {job.dialect for job in tuning_jobs(["full", "dora"])} == {"target"}
    assert tuned_for(["ranks"]) == ["lora"] and tuned_for(["unseen"]) == ["lora", "lora-unseen"]
    assert set(tuned_for(["rivals"])) == {*PLACEMENTS, "full"}
    assert len({job.name for job in grid}) == len(grid), "each is a run of its own"


def test_every_question_gets_its_runs():
    listed = jobs(GROUPS, 2, CHOSEN)
    of = {group: [job for job in listed if job.group == group] for group in GROUPS}
    assert {job.method for job in of["methods"]} == {BASE, PROBE, *METHODS}
    assert {job.method for job in of["rivals"]} == {BASE, *RIVALS, *PLACEMENTS, "full"}
    assert {(job.method, job.unseen) for job in of["unseen"]} == {(BASE, False), ("lora", False), ("lora", True)}
    ranks = {(job.rank, job.seed): job for job in of["ranks"]}
    assert set(ranks) == {(r, seed) for r in (1, 2, 4, 8, 16, 32, 64) for seed in (0, 1)}
    assert {job.learning_rate for job in ranks.values()} == {CHOSEN["lora"][0]}
    sizes = {(job.method, job.studies) for job in of["studies"]}
    assert sizes == {(m, n) for m in ("lora", "full", PROBE) for n in (16, 32, 64, 128, 256, 512, None)}
    assert [job.method for job in jobs(["ranks"], 1, CHOSEN)].count(BASE) == 1
    assert not [job for job in jobs(GROUPS, 2, {}) if job.method in METHODS], "not before a rate is chosen"


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
    model = data.mini.model
    biases = sum(p.numel() for name, p in model.named_parameters() if name.endswith(".bias"))
    of_probe = (model.config.projection_dim + 1) * (18 - len(found["one_class"]))
    trainable = {BASE: 0, PROBE: of_probe, "bitfit": biases}[method]
    assert found["trainable"] == trainable
    assert found["adapter_bytes"] - 4 * trainable in range(20_000 if method == "bitfit" else 1)
    assert 0 <= found["validation_auroc"] <= 1 and found["seconds"] > 0
    json.dumps(found, allow_nan=False)


def test_collected_draws_are_those_of_the_metrics(data, tmp_path):
    for job in (Job("methods", BASE), Job("rivals", "linear-probe")):
        found = run_job(job, data, TOY, tmp_path) | {"made_with": comparison.made_with(0), "settings": {}}
        keys = ("method", "rank", "studies", "learning_rate", "dialect", "unseen", "seed")
        write_result(tmp_path, job, **found | {key: getattr(job, key) for key in keys})
    collect(tmp_path, data.test.rows, data.home.rows, 1)
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


def test_draws_of_two_scores_are_of_the_same_resamples():
    rng = np.random.default_rng(0)
    labels, scores, patients = rng.integers(0, 2, (40, 18)), rng.random((40, 18)), np.arange(40) // 2
    better = scores**2 * labels
    difference = metrics.mean_draws(labels, better, patients) - metrics.mean_draws(labels, scores, patients)
    compared_mean = metrics.compare(labels, scores, better, patients, resamples=1000).loc["mean"]
    ends = [difference[0], np.percentile(difference[1:], 97.5)]
    assert ends == pytest.approx([compared_mean["auroc"], compared_mean["auroc_high"]])


def write_result(folder, job, **content):
    path = result_file(folder, job)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def test_rate_and_dialect_are_chosen_by_validation_once_the_whole_grid_is_there(tmp_path):
    grid = tuning_jobs(["lora-text"])
    assert len(grid) == 2 * len(METHODS["lora-text"].learning_rates)

    def chosen():
        return comparison._chosen(tmp_path, ["lora-text"])

    def is_chosen(job):
        return chosen() == {"lora-text": (job.learning_rate, job.dialect)}

    for job in grid[:-1]:
        write_result(tmp_path, job, settings={}, validation_auroc=0.6, test=0.9)
    assert chosen() == {}
    write_result(tmp_path, grid[-1], settings={}, validation_auroc=0.6, test=0.99)
    assert is_chosen(grid[0]), "of equals, the lowest rate"
    write_result(tmp_path, grid[-2], settings={}, validation_auroc=0.7, test=0.1)
    assert is_chosen(grid[-2]), "whatever the test studies say"
    write_result(tmp_path, grid[-2], settings={}, diverged="loss is nan")
    assert is_chosen(grid[0]), "what diverges is left out, and ends nothing"
    for job in grid:
        write_result(tmp_path, job, settings={}, diverged="loss is nan")
    with pytest.raises(ValueError, match="lora-text diverged with every learning rate of its grid"):
        chosen()


def test_a_run_that_diverges_says_so(data, tmp_path):
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


def test_settings_hold_what_a_result_depends_on(toy_cohort):
    inputs = one_run.inputs_of(toy_cohort / "manifest.csv")
    found = one_run.settings_of(Job("studies", "lora", 16, studies=16, learning_rate=1e-3), SETTINGS, inputs)
    expected = {"steps": 100, "batch_size": 16, "evaluate_every": 25, "weight_decay": 0.01, "prompt_weight": 1.0}
    assert expected.items() <= found.items() and set(inputs) < set(found)
    assert set(one_run.settings_of(Job("methods", BASE), SETTINGS, inputs)) == {"base", "manifest"}
    json.dumps(found)


KILLED = """
import os, sys
from medctkit.experiments.compare import run_all as comparison, runs as one_run
one_run.RANKS, one_run.DIALECTS = (1, 16), ("target",)
os.cpu_count = lambda: 1  # tensors this small lose time to threads that wait for each other
if __name__ == "__main__":
    toy = comparison.FineTuneConfig(steps=1, batch_size=4, evaluate_every=1)
    comparison.compare_methods(sys.argv[1], sys.argv[2], ["ranks"], 1, toy, 1, sys.argv[3])
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_comparison_goes_on_where_it_was(toy_cohort, tmp_path, monkeypatch, capsys):
    out, script = tmp_path / "out", tmp_path / "run.py"
    script.write_text(KILLED)
    arguments = [str(toy_cohort / "manifest.csv"), str(out), str(toy_cohort / "prepared")]
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
    monkeypatch.setattr(one_run, "DIALECTS", ("target",))
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    compare_methods(arguments[0], out, ["ranks"], 1, TOY, 1, arguments[2])
    said = capsys.readouterr().out
    assert f"5 runs, {len(first)} of them there; about" in said
    assert all(path.stat().st_mtime_ns == at for path, at in first.items())
    assert len(list(out.glob("runs/*.json"))) == 5 and not (out / "work").exists()
    assert not [path for path in out.rglob("*.tmp") if path not in first]

    results = load_results(out)
    assert sorted(name for name in results.draws if "/" not in name) == sorted(p.stem for p in out.glob("runs/*.json"))
    counts = {"learning-rates": 3, "methods": 2, "ranks": 2, "rivals": 2, "studies": 1, "unseen": 2}
    assert [group for group in GROUPS if results.has(group)] == ["learning-rates", "methods", "ranks", "studies"]
    assert results.runs.groupby("group").size().to_dict() == counts
    shared = results.runs[results.runs["method"] == "lora"].groupby("name")["group"].agg(set)
    assert set(counts) in list(shared), "rank 16 with all studies is a run of all groups"
    with pytest.raises(ValueError, match="steps: 1 there, 2 here"):
        compare_methods(arguments[0], out, ["ranks"], 1, replace(TOY, steps=2), 1, arguments[2])
    assert len(list(out.glob("runs/*.json"))) == 5


def test_costs_are_relative_to_full_fine_tuning(data, monkeypatch):
    monkeypatch.setattr(comparison, "METHODS", {name: METHODS[name] for name in ("full", "lora", "bitfit")})
    table = measure_costs(data.train, TOY, repeats=1).set_index("method")
    assert table.loc["full", ["seconds_per_step_of_full", "peak_bytes_of_full"]].tolist() == [1, 1]
    weights = 4 * data.mini.model.num_parameters()
    assert table.loc["full", "peak_bytes"] > 4 * weights, "weights, gradients and two averages"
    assert table.loc["lora", "peak_bytes"] < table.loc["full", "peak_bytes"] - 2 * weights
    assert (table["seconds_per_step"] > 0).all() and (table["batch_size"] == 4).all()


def test_the_command_refuses_what_it_does_not_know(tmp_path):
    result = CliRunner().invoke(app, ["compare", str(tmp_path), "--only", "rank"])
    assert result.exit_code == 1
    assert "unknown group 'rank'; choose from learning-rates, methods, rivals, unseen, ranks, studies" in result.output
    with pytest.raises(ValueError, match="seeds and workers must be at least 1, got 0 and 1"):
        compare_methods("data_manifest.csv", tmp_path, seeds=0)
    assert not os.listdir(tmp_path)
