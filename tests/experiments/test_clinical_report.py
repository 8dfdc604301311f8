"""Clinical statistics of both models: chosen on validation, measured on test, and as a part of the report."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from test_report import measurement

from medctkit.experiments.clinical import MARKED, Clinical, clinical_statistics
from medctkit.experiments.report import claims, figures
from medctkit.experiments.report import clinical as report
from medctkit.findings import FINDINGS, PREVALENCE
from medctkit.metrics.clinical import subgroup_table
from medctkit.metrics.scores import evaluate

ROOT = Path(__file__).resolve().parents[2]


def statistics(measured, valid_labels=None, resamples=20):
    """The statistics of a made-up measurement, whose validation studies are the test studies by other names."""
    labels = measured.labels if valid_labels is None else valid_labels
    test, valid = (SimpleNamespace(labels=part, patients=measured.patients) for part in (measured.labels, labels))
    groups = pd.DataFrame({"sex": np.where(np.arange(120) < 90, "F", "M"), "age": ""})
    limits = {name: np.full(18, 0.6) for name in measured.scores}
    both = {"valid": measured.scores, "test": measured.scores}
    return clinical_statistics(valid, test, both, limits, groups, resamples, 0)


@pytest.fixture(scope="module")
def measured():
    made = measurement()
    return dataclasses.replace(made, clinical=statistics(made))


def test_each_table_is_what_its_definition_says(measured):
    tables = measured.clinical.tables
    assert tables["subgroups"]["subgroup"].tolist() == ["F", "M"], "no age is known"
    assert tables["subgroups"]["warning"].tolist() == ["only 45 patients", "only 15 patients"]
    table = tables["recalibration"].set_index(["model", "method"])
    plain = evaluate(measured.labels, measured.scores["adapted"], measured.patients, resamples=2).loc["mean"]
    for metric in ("brier", "calibration_error"):
        assert table.loc[("adapted", "none"), metric] == pytest.approx(plain[metric])
    for model, rows in tables["recalibration"].groupby("model"):
        assert rows.loc[rows["validation"].idxmin(), "chosen"] and rows["chosen"].sum() == 1, model
    first = tables["predictive values"].iloc[0]
    at = evaluate(measured.labels, measured.scores["base"], measured.patients, 0.6, resamples=2).loc[FINDINGS[0]]
    share, sens, alarms = PREVALENCE[FINDINGS[0]], at["sensitivity"], 1 - at["specificity"]
    assert first["prevalence"] == share
    assert first["base PPV"] == pytest.approx(sens * share / (sens * share + alarms * (1 - share)), abs=1e-5)
    assert first["base PPV_low"] <= first["base PPV"] <= first["base PPV_high"]
    assert tables["net benefit"]["threshold"].tolist() == list(MARKED) and len(tables["predictive values"]) == 18
    crg = tables["CRG score"].set_index("model")["score"]
    assert crg["difference"] == pytest.approx(crg["adapted"] - crg["base"]) and crg["adapted"] > crg["base"]
    assert tables["DeLong"]["auroc"].iloc[-1] == pytest.approx(measured.difference.loc["mean", "auroc"])


def test_validation_labels_choose_and_test_labels_measure(measured):
    guesses = (np.random.default_rng(5).random((120, 18)) < 0.3).astype(float)
    guessing, right = statistics(measured, guesses).tables, measured.clinical.tables
    said, meant = (tables["recalibration"].set_index(["model", "method"])["brier"] for tables in (guessing, right))
    assert said["adapted", "Platt"] > meant["adapted", "Platt"] + 0.02
    assert said["adapted", "none"] == meant["adapted", "none"]
    for name in ("predictive values", "subgroups", "CRG score", "DeLong"):
        pd.testing.assert_frame_equal(guessing[name], right[name])


def test_the_report_and_metrics_json_show_each_part_beside_what_was_there(measured):
    written = json.loads(json.dumps(measured.summary, allow_nan=False))
    assert set(written) - {"clinical"} == set(measurement().summary)
    assert set(written["clinical"]) == set(measured.clinical.tables)
    titles = [block.text for block in claims.blocks(measured) if block.kind == "heading"]
    shown = {title: (words, report.in_text(table)) for title, words, _, table in report.parts(measured)}
    assert titles[-len(shown) - 2 : -2] == list(shown) and titles[-2] == "What check-lists ask"
    without = [block.text for block in claims.blocks(measurement()) if block.kind == "heading"]
    assert not set(shown) & set(without) and "What check-lists ask" in without
    assert shown["Subgroups"][1]["difference"][0].startswith("+")
    assert shown["Calibration made anew"][1]["chosen"].tolist().count("yes") == 2
    assert list(shown["Decision curves"][1]) == ["threshold", "nobody", "everybody", "base", "adapted"]
    drawn = figures.decision_curves(measured).axes
    assert len(drawn) == 18 and len(drawn[0].lines) == 4


def test_words_follow_from_the_numbers(measured):
    tables = {name: table.copy() for name, table in measured.clinical.tables.items()}
    tables["subgroups"][["against the rest_low", "against the rest_high"]] = [[-0.2, 0.1], [-0.3, -0.1]]
    tables["net benefit"][["everybody_high", "adapted_low"]] = [[0.2, 0.1], [-1, 0.1], [0.1, 0.2], [-1, -0.1], [0, 0]]
    tables["DeLong"].loc[4, ["auroc_low", "auroc_high"]] = -1 * measured.difference[["auroc_low", "auroc_high"]].iloc[4]
    tables["DeLong"].loc[5, ["auroc_low", "auroc_high"]] = [-1, 1]
    made = dataclasses.replace(measured, clinical=Clinical(tables, {}))
    words = {title: text for title, text, _, _ in report.parts(made)}
    assert "of 2 in which" in words["Subgroups"] and ": 1: M. " in words["Subgroups"]
    assert f": 2: {MARKED[1]}, {MARKED[2]}. " in words["Decision curves"]
    assert words["DeLong's test beside the bootstrap"].endswith(f": 1: {FINDINGS[5]}.")


def test_a_manifest_that_says_nothing_of_its_patients_has_a_report_too(measured):
    none = subgroup_table(measured.labels, measured.scores, measured.patients, pd.DataFrame(index=range(120)), 20)
    made = dataclasses.replace(measured, clinical=Clinical(measured.clinical.tables | {"subgroups": none}, {}))
    shown = {title: (words, report.in_text(table)) for title, words, _, table in report.parts(made)}
    assert shown["Subgroups"][0].startswith("Subgroups of 0 ") and shown["Subgroups"][1].empty
    assert claims.blocks(made)


def test_the_check_lists_are_whole_and_say_where_an_answer_is(measured):
    table = report.checklists()
    parts = {
        "CLAIM 2024": (44, {}),
        "STARD-AI": (40, {15: "abcd", 16: "abc", 17: "ab", 26: "ab", 40: "ab"}),
        "TRIPOD+AI": (27, {n: "abc" for n in (3, 6, 8, 9, 20, 27)} | {5: "ab", 12: "abcdefg", 18: "abcdef", 23: "ab"}),
    }
    for name, (last, letters) in parts.items():
        items = [f"{i}{letter}" for i in range(1, last + 1) for letter in letters.get(i, "") or [""]]
        asked = " ".join(table[name]).split()
        assert sorted(asked) == sorted(items), name
    headings = {f"report: {block.text}" for block in claims.blocks(measured) if block.kind == "heading"}
    for row in table.itertuples():
        places = row.where.split("; ") if row.where else []
        assert all(place in headings or (ROOT / place).exists() for place in places), row
        assert row.answered in ("yes", "partly", "no", "not applicable")
        assert bool(places) == (row.answered in ("yes", "partly")) and bool(row.why) == (row.answered != "yes"), row
