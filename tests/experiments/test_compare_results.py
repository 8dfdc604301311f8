"""What is made of a comparison's runs: seeds pooled, paired differences, tables, their text, and figures."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from medctkit.experiments.compare import figures, tables
from medctkit.experiments.compare import results as compared
from medctkit.experiments.compare.data import HELD_OUT
from medctkit.experiments.compare.results import DIVERGED, Results, load_results, pooled
from medctkit.experiments.compare.runs import BASE, GROUPS, PROBE, STRENGTHS
from medctkit.findings import FINDINGS
from medctkit.lora.methods import METHODS
from medctkit.zero_shot.prompts import PROMPTS


def hand_made(costs=True):
    """Runs with three resamples one can add up in the head."""
    draws = {
        "base": [0.50, 0.40, 0.50, 0.60],
        "base/home": [0.80, 0.70, 0.80, 0.90],
        "lora-0": [0.60, 0.50, 0.60, 0.70],
        "lora-1": [0.70, 0.60, 0.60, 0.80],
        "lora-0/home": [0.70, 0.60, 0.80, 0.80],
        "lora-1/home": [0.80, 0.60, 0.80, 0.90],
        "full-0": [0.65, 0.65, 0.65, 0.65],
        "probe": [0.62, 0.52, 0.62, 0.72],
        "registration": [0.55, 0.40, 0.55, 0.65],
        "coral": [0.51, 0.45, 0.50, 0.60],
        "best": [0.56, 0.41, 0.55, 0.65],
        "boxes": [0.66, 0.65, 0.65, 0.70],
        "unseen": [0.60, 0.50, 0.60, 0.70],
    }
    for percent in (5, 10, 20):
        draws |= {
            f"{name}/flipped {percent}": np.array(draws[name]) - percent / 500 for name in ("base", "lora-0", "lora-1")
        }
        draws[f"noise-{percent}"] = np.array(draws["lora-0"]) - percent / 100
    for strength in STRENGTHS:
        draws |= {
            f"{n}/strength {strength:g}": 0.5 + strength / 10 * np.ones(4) for n in ("lora-0", "lora-1", "full-0")
        }
        draws |= {
            f"{n}/strength {strength:g}/home": np.array(draws["base/home"]) for n in ("lora-0", "lora-1", "full-0")
        }
    draws |= {"base/home calibration": [0.1] * 4, "lora-0/home calibration": [0.2, 0.1, 0.2, 0.4]}
    draws |= {"lora-1/home calibration": [0.2, 0.1, 0.2, 0.4], "replay": [0.58] * 4, "replay/home": [0.8] * 4}
    for name, of_finding in (("base", 0.5), ("lora-0", 0.6), ("lora-1", 0.7), ("boxes", 0.66)):
        each = np.full((4, 18), of_finding) + np.arange(18) / 100 * (name == "boxes")
        each[:, 5] = np.nan  # one class in the test studies
        each[3, 6] = np.nan  # one class in a resample
        draws[f"{name}/findings"] = each.astype(np.float16)
    for name, held_out, seen in (("base", 0.5, 0.6), ("lora-0", 0.7, 0.7), ("lora-1", 0.8, 0.8), ("unseen", 0.45, 0.7)):
        for i, prompts in enumerate(PROMPTS):
            draws[f"{name}/held out/{prompts}"] = np.array([0, 0, 0.01, 0.02]) + held_out + i / 10
            draws[f"{name}/seen/{prompts}"] = np.array([0, 0, 0.01, 0.02]) + seen + i / 10
    rate, low = METHODS["lora"].learning_rates[1], METHODS["full"].learning_rates[0]
    rows = [(group, "base", BASE, np.nan, 0, np.nan, 0, "") for group in GROUPS]
    for seed in (0, 1):
        rows += [(g, f"lora-{seed}", "lora", 16, 1301, rate, seed, "") for g in ("methods", "rivals", "unseen")]
    rows += [
        ("ranks", "lora-0", "lora", 16, 1301, rate, 0, ""),
        ("ranks", "lora-1", "lora", 8, 1301, rate, 0, ""),
    ]
    rows += [(group, "full-0", "full", np.nan, 1301, low, 0, "") for group in ("methods", "rivals")]
    rows += [("methods", "probe", PROBE, np.nan, 1301, np.nan, 0, "")]
    rows += [
        ("studies", "lora-0", "lora", 16, 16, rate, 0, ""),
        ("studies", "lora-1", "lora", 16, 1301, rate, 0, ""),
    ]
    others = {
        "coral": "coral",
        "registration": "registration",
        "boxes": "hu-boxes",
        "best": "best-free",
        "probe": PROBE,
    }
    rows += [("rivals", name, method, np.nan, 1301, np.nan, 0, "") for name, method in others.items()]
    alike = ("lora", 16, 1301, rate)
    rows += [("noise", f"lora-{i}", *alike, i, "") for i in (0, 1)]
    rows += [("noise", f"noise-{percent}", *alike, 0, f"noise-{percent}") for percent in (5, 10, 20)]
    rows += [("forgetting", f"lora-{i}", *alike, i, "") for i in (0, 1)]
    rows += [("forgetting", "replay", *alike, 0, "replay"), ("forgetting", "full-0", "full", np.nan, 1301, low, 0, "")]
    rows += [("unseen", "unseen", "lora", 16, 1301, rate, 0, "unseen")]
    columns = ["group", "name", "method", "rank", "studies", "learning_rate", "seed", "variant"]
    runs = pd.DataFrame(rows, columns=columns).assign(dialect="target", chosen="")
    runs.loc[runs["name"] == "boxes", "chosen"] = "C = 0.01"
    runs["trainable"] = runs["method"].map({BASE: 0, "lora": 50, "full": 1000, PROBE: 20}).fillna(0)
    runs["adapter_bytes"], runs["validation_auroc"] = 4 * runs["trainable"], 0.6
    runs["best_step"] = 20
    runs["history"], runs["intruders"] = "[[0, 0.5], [10, 0.55], [20, 0.59]]", 1.0
    runs.loc[runs["name"] == "base", "validation_auroc"] = 0.5
    runs["home_calibration_error"] = runs["name"].map({"base": 0.1, "lora-0": 0.2, "lora-1": 0.3})
    table = pd.DataFrame({"method": ["full", "lora"], "seconds_per_step": [2.0, 1.5], "peak_bytes": [4e6, 1e6]})
    table["seconds_per_step_of_full"], table["peak_bytes_of_full"] = [1, 0.75], [1, 0.25]
    return Results(runs, {name: np.array(values) for name, values in draws.items()}, table if costs else table[:0])


def ends(table, row, name):
    return table.loc[row, [name, f"{name}_low", f"{name}_high"]].tolist()


def between(value, *drawn):
    """A value, and the 95 % interval of these draws."""
    return pytest.approx([value, *np.percentile(drawn, [2.5, 97.5])])


def test_seeds_are_averaged_within_each_resample():
    table = pooled(hand_made(), "methods").set_index("method")
    assert table.loc["lora", "seeds"] == 2 and table.loc["lora", "auroc_sd"] == pytest.approx(0.1 / np.sqrt(2))
    # means of the two seeds: 0.65 on the data, then 0.55, 0.60, 0.75; minus the base model in the same resample
    assert ends(table, "lora", "auroc") == between(0.65, 0.55, 0.60, 0.75)
    assert ends(table, "lora", "over_base") == between(0.15, 0.15, 0.10, 0.15)
    # at home 0.75, then 0.60, 0.80, 0.85; the base model 0.80, then 0.70, 0.80, 0.90
    assert ends(table, "lora", "home_over_base") == between(-0.05, -0.10, 0.0, -0.05)
    assert np.isnan(ends(table, "full", "home")).all(), "not kept"
    assert table.loc["lora", "home_calibration_error"] == pytest.approx(0.25)
    # mirrored at 0.1, for resamples make it larger: -0.0, 0.1, 0.3 become 0.2, 0.1, -0.1
    assert ends(table, "lora", "home_calibration_over_base") == between(0.1, 0.2, 0.1, -0.1)
    assert table.loc["lora", "steps_to_equal"] == 20, "0.58 is 80 % of the way from 0.5 to 0.6"


@pytest.mark.parametrize(("group", "other"), [("ranks", "lora-1"), ("studies", "lora-0")])
def test_lora_of_its_usual_rank_with_all_studies_says_what_is_equal(group, other):
    results = hand_made()
    results.runs.loc[results.runs["name"] == other, "validation_auroc"] = 0.9
    assert (pooled(results, group).set_index("method").loc["lora", "steps_to_equal"] == 20).all()


def test_lora_is_held_against_each_rival_within_each_resample():
    table = compared.rivals_table(hand_made())
    order = [BASE, "registration", "coral", "best-free", "hu-boxes", PROBE, "full", "lora"]
    assert table["method"].tolist() == order
    table = table.set_index("method")
    assert ends(table, "hu-boxes", "lora_over") == between(-0.01, -0.10, -0.05, 0.05)
    assert ends(table, "lora", "lora_over") == [0, 0, 0]
    assert table["labels"].tolist() == ["none"] * 3 + ["choose", "learn", "learn", "learn", "learn"]
    assert table["kind"].tolist() == ["free"] * 3 + ["same labels"] * 3 + ["trained"] * 2
    assert table.index[table["at_edge"]].tolist() == ["full"]


def test_the_best_free_fix_is_named_for_both_kinds_of_patients():
    results = hand_made()
    results.runs.loc[results.runs["name"] == "coral", "validation_auroc"] = 0.7
    on_test, on_valid = compared.best_free(results).itertuples()
    assert (on_test.method, on_valid.method) == ("registration", "coral")
    lines = tables.show_all(results).splitlines()
    said = {word: next(line for line in lines if f"best on {word}" in line) for word in ("the test", "validation")}
    assert "registration (+0.050 over base): +0.100 [+0.052, +0.148]" in said["the test"]
    assert "CORAL (+0.010 over base): +0.140" in said["validation"]
    of = {
        name: next(line for line in lines if line.lstrip().startswith(f"{name} ")) for name in ("HU in boxes", "LoRA")
    }
    assert "-0.010 [-0.097, +0.045]" in of["HU in boxes"] and "C = 0.01" in of["HU in boxes"]
    assert f"{METHODS['full'].learning_rates[0]:g}*, target" in "\n".join(lines)
    alone = Results(results.runs[results.runs["method"] != "lora"], results.draws, results.costs)
    assert compared.rivals_table(alone)["lora_over"].isna().all() and "registration" in tables.show_all(alone)


@pytest.mark.parametrize("elsewhere", [{}, {"rank": 8}, {"dialect": "source"}, {"variant": "unseen"}])
def test_a_rate_at_the_edge_of_its_own_sweep_is_told(elsewhere):
    results = hand_made()
    rate = METHODS["lora"].learning_rates[1]
    one = results.runs[results.runs["name"] == "lora-0"][:1].assign(group="learning-rates", validation_auroc=np.nan)
    swept = [one.assign(learning_rate=r) for r in (rate, 1)] + [one.assign(learning_rate=1e-9, **elsewhere)]
    results = Results(pd.concat([results.runs, *swept]), results.draws, results.costs)
    assert compared.rivals_table(results).set_index("method").loc["lora", "at_edge"] == bool(elsewhere)
    assert pooled(results, "forgetting").set_index("variant").loc["replay", "at_edge"] == bool(elsewhere)


def test_strengths_begin_at_the_base_model_and_noise_is_paired():
    results = hand_made()
    table = compared.strength_table(results).set_index(["method", "strength"])
    assert sorted({s for _, s in table.index}) == sorted({0, 1, *STRENGTHS})
    assert ends(table, ("lora", 0), "over_base") == [0, 0, 0] == ends(table, ("full", 0), "home_over_base")
    assert ends(table, ("lora", 1), "over_base") == between(0.15, 0.15, 0.10, 0.15)
    assert table.loc[("lora", 0.5), "auroc"] == pytest.approx(0.55)
    noise = compared.noise_table(results).set_index("flipped")
    assert ends(noise, 0, "lost") == [0, 0, 0] and ends(noise, 20, "lost")[0] == pytest.approx(0.4 - 0.65)
    assert ends(noise, 10, "measured")[0] == pytest.approx(0.63)
    assert ends(noise, 10, "measured_gain") == ends(noise, 0, "measured_gain") == between(0.15, 0.15, 0.10, 0.15)


def test_forgetting_holds_what_trains_the_model_and_its_remedies():
    table = compared.forgetting_table(hand_made())
    assert set(table["label"]) == {"LoRA", "LoRA, replay"}, "full fine-tuning was not scored at home"


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        ("lora", "base", "LoRA is better than base model: +0.101 [+0.088, +0.114], 2 and 1 runs"),
        ("base", "lora", "LoRA is better than base model: +0.101 [+0.088, +0.114], 2 and 1 runs"),
        ("lora", "linear-probe", "linear probe is better than LoRA: +0.019 [+0.006, +0.032], 1 and 2 runs"),
        ("full", "lora", "full fine-tuning and LoRA are not compared: no step of full fine-tuning was better than the"),
    ],
)
def test_a_verdict_follows_from_the_interval(one, other, said):
    """Seeds that are 0.002 apart: a standard error of 0.001, and 12.7 of them with one degree of freedom."""
    results = hand_made()
    results.draws["lora-1"] = results.draws["lora-0"] + 0.002
    results.runs.loc[results.runs["method"].isin(["full", BASE, PROBE]), "best_step"] = 0
    assert tables.verdict(results, "methods", one, other).startswith(said)


@given(st.integers(0, 10**6), st.integers(2, 5), st.integers(2, 5))
@settings(deadline=None, max_examples=20)
def test_where_patients_say_nothing_seeds_give_welchs_interval(seed, n, m):
    rng = np.random.default_rng(seed)
    runs = {f"a{i}": rng.normal(0.6, 0.02) for i in range(n)} | {f"b{i}": rng.normal(0.6, 0.01) for i in range(m)}
    results = Results(pd.DataFrame(), {name: np.full(50, value) for name, value in runs.items()}, pd.DataFrame())
    one, other = ([name for name in runs if name[0] == side] for side in "ab")
    welch = stats.ttest_ind([runs[i] for i in one], [runs[i] for i in other], equal_var=False).confidence_interval()
    assert tables.difference_of_means(results, one, other)[1:] == pytest.approx((welch.low, welch.high))


def test_one_run_on_each_side_has_the_interval_of_its_patients():
    drawn = np.random.default_rng(0).normal(0.1, 0.02, 4001)
    results = Results(pd.DataFrame(), {"a": drawn, "b": np.zeros(4001)}, pd.DataFrame())
    value, low, high = tables.difference_of_means(results, ["a"], ["b"])
    assert value == drawn[0] and (high - low) / 2 == pytest.approx(1.96 * drawn[1:].std(), rel=1e-3)


def test_a_verdict_needs_its_runs():
    assert tables.verdict(hand_made(), "forgetting", "lora, replay", "lora", "/home").startswith("LoRA, replay")
    with pytest.raises(ValueError, match="'methods' has no run of 'dora' yet. medctkit compare FOLDER --only methods"):
        tables.verdict(hand_made(), "methods", "dora", "lora")


def test_findings_are_sorted_by_lead_and_one_class_counts_nowhere():
    table = compared.finding_table(hand_made())
    assert table.index[0] == FINDINGS[0] and table.index[-1] == "mean" and set(table.index[:-1]) == set(FINDINGS)
    assert ends(table, FINDINGS[2], "lora_over") == pytest.approx([-0.03] * 3, abs=2e-3)
    assert np.isnan(ends(table, FINDINGS[5], "lora_over")).all()
    mean = 0.65 - 0.66 - np.mean([k for k in range(18) if k != 5]) / 100
    assert table.loc["mean", "lora_over"] == pytest.approx(mean, abs=2e-3)
    shown = tables.shown(table.reset_index(), tables.TABLES["findings"].columns)
    assert "nan" not in shown.to_string() and (shown == "-").any(axis=None)


def test_held_out_findings_stand_beside_those_that_were_taught():
    table = compared.unseen_table(hand_made()).set_index(["findings", "prompts"])
    assert list(table.index) == [(findings, prompts) for findings in ("held out", "seen") for prompts in PROMPTS]
    for prompts in PROMPTS:
        assert ends(table, ("held out", prompts), "gain") == pytest.approx([-0.05] * 3)
        assert ends(table, ("seen", prompts), "gain") == pytest.approx([0.1] * 3)
        assert ends(table, ("held out", prompts), "taught_gain") == pytest.approx([0.25] * 3)
    assert table.loc[("seen", "ensemble"), "adapted"] > table.loc[("seen", "paper"), "adapted"]
    text = tables.shown(table.reset_index(), tables.TABLES["unseen"].columns).to_string()
    assert "-0.050 [-0.050, -0.050]" in text and all(name in tables.TABLES["unseen"].note for name in HELD_OUT)


def test_method_table_has_a_row_for_each_method_base_first():
    table = compared.method_table(hand_made())
    assert table["method"].tolist() == [BASE, PROBE, "full", "lora"]
    assert table["any_prompt"].tolist() == [True, False, True, True]
    assert table["peak_bytes_of_full"].fillna(-1).tolist() == [-1, -1, 1, 0.25]


def test_figures_show_intervals_labels_and_the_base_model(tmp_path):
    results = hand_made()
    for figure, words in (
        (figures.figure_methods(results), "trainable parameters"),
        (figures.figure_studies(results), "studies"),
    ):
        (axes,) = figure.axes
        assert axes.get_xscale() == "log" and words in axes.get_xlabel() and "Phantom" in axes.get_title()
        base = axes.lines[0]
        assert base.get_linestyle() == "--" and list(base.get_ydata()) == [0.5, 0.5]
    methods = figures.figure_methods(results).axes[0]
    assert {text.get_text() for text in methods.texts} == {"r=8", "r=16"}
    named = [text.get_text() for text in methods.get_legend().get_texts()]
    expected = ["base model, 0.500", "linear probe, 0.620 (18 answers only)", "LoRA, 0.650", "full fine-tuning, 0.650"]
    assert named == expected
    bars = sorted(tuple(np.round(path.vertices[:, 1], 3)) for c in methods.collections[1:] for path in c.get_paths())
    assert (0.552, 0.742) in bars
    line = figures.figure_studies(results).axes[0].lines[1]
    assert [list(line.get_xdata()), list(line.get_ydata())] == [[16, 1301], [0.6, 0.7]]
    written = figures.write_figures(results, tmp_path)
    assert [path.stem for path in written] == ["methods", "studies", "rivals", "forgetting"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in written)


def test_rivals_are_drawn_a_line_each_by_kind_and_forgetting_against_gain():
    results = hand_made()
    axes = figures.figure_rivals(results).axes[0]
    named = [text.get_text() for text in axes.get_yticklabels()]
    assert named[0] == "registration  0.550" and named[-1] == "LoRA  0.650" and len(named) == 7
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["base model, 0.500", *compared.KINDS]
    bars = [tuple(np.round(path.vertices[:, 0], 3)) for c in axes.collections for path in c.get_paths()]
    assert (0.552, 0.742) in bars and axes.yaxis_inverted()
    axes = figures.figure_forgetting(results).axes[0]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["LoRA, +0.150 / -0.050", "LoRA, replay, +0.080 / +0.000"]
    assert len([line for line in axes.lines if len(line.get_xdata()) == 2 + len(STRENGTHS)]) == 2


def test_an_interval_that_leaves_its_value_out_is_drawn():
    results = hand_made()
    for name in ("coral", "lora-0", "lora-1", "lora-0/home", "lora-1/home"):
        results.draws[name] = results.draws[name] + [0.3, 0, 0, 0]
    for draw in (figures.figure_rivals, figures.figure_methods, figures.figure_forgetting):
        assert draw(results)


def test_what_is_there_is_shown_and_what_is_missing_is_said(tmp_path):
    results = hand_made()
    assert set(tables.all_tables(results)) == set(tables.TABLES) - {"loss", "placement"}
    assert "--only loss,placement; runs still" in tables.missing(
        results
    ) and "--only loss,placement" in tables.show_all(results)
    methods = Results(results.runs[results.runs["group"] == "methods"], results.draws, results.costs)
    assert set(tables.all_tables(methods)) == {
        "methods"
    } and "rivals,loss,unseen,placement,forgetting" in tables.missing(methods)
    assert [path.stem for path in figures.write_figures(methods, tmp_path)] == ["methods"]
    assert tables.show_all(load_results())
    tables.write_tables(results, tmp_path)
    written = json.loads((tmp_path / "tables.json").read_text())
    lora = next(row for row in written["methods"] if row["method"] == "lora")
    assert [lora[key] for key in ("over_base", "over_base_low", "over_base_high")] == between(0.15, 0.15, 0.10, 0.15)


def test_missing_results_say_how_to_make_them(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="has no comparison.csv; `medctkit compare .*` makes it"):
        load_results(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"^{tmp_path}/x has no"):
        load_results("~/x")
    results = hand_made()
    with pytest.raises(ValueError, match="no runs of group 'learning-rates'; there are .*methods, .*ranks, rivals"):
        pooled(results, "learning-rates")
    there = ~results.runs["name"].isin(["boxes", "unseen"])
    results = Results(results.runs[there], results.draws, results.costs)
    for table, run in ((compared.finding_table, "hu-boxes"), (compared.unseen_table, "lora, unseen")):
        with pytest.raises(ValueError, match=f"no run of '{run}'.* medctkit compare FOLDER --only"):
            table(results)


def test_runs_that_are_missing_are_named_with_their_number():
    said = tables.missing(hand_made())
    assert said.startswith("not measured yet: medctkit compare FOLDER --only loss,placement")
    assert "LoRA, replay (1 of 2)" in said and "DoRA (0 of 2)" in said and "CORAL" not in said
    assert "LoRA, rank 8 (1 of 2)" in said and "LoRA, rank 64 (0 of 2)" in said
    assert "LoRA, 16 studies (1 of 2)" in said and "HU in boxes, 64 studies (0 of 2)" in said
    few = hand_made()
    few.runs["studies"] = few.runs["studies"].replace(1301, 300)
    assert "256 studies" in tables.missing(few) and "1024 studies" not in tables.missing(few), "no run has so many"


def test_runs_that_diverged_are_told_from_those_still_to_be_done(tmp_path):
    results = hand_made()
    rows = [
        ("forgetting", "a", "lora", 16, 1301, "replay", 1, "loss is nan"),
        ("forgetting", "b", "lora", 16, 1301, "anchor-10", 0, "loss is nan"),
        ("ranks", "c", "lora", 64, 1301, "", 1, "loss is nan"),
    ]
    results = replace(results, diverged=pd.DataFrame(rows, columns=DIVERGED))
    before, said = tables.missing(hand_made()), tables.missing(results)
    assert "LoRA, replay (1 of 2)" in before and "diverged" not in before
    to_do, diverged = said.split("; diverged, and left out: ")
    assert diverged == "LoRA, replay (1 of 2), LoRA, anchor-10 (1 of 2), LoRA, rank 64 (1 of 2)"
    assert "LoRA, replay" not in to_do and "LoRA, anchor-10 (0 of 2)" in to_do and "LoRA, rank 64 (0 of 2)" in to_do
    assert said in tables.show_all(results)
    with pytest.raises(ValueError, match="'forgetting' has no run of 'lora, anchor-10': all 1 diverged"):
        tables.verdict(results, "forgetting", "lora", "lora, anchor-10")
