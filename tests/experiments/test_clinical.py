"""Clinical statistics of both models: chosen on validation, measured on test, and as a part of the report."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from test_report import measurement

from medctkit.experiments.clinical import MARKED, clinical_statistics
from medctkit.experiments.report import claims, figures
from medctkit.experiments.report import clinical as report
from medctkit.findings import FINDINGS, PREVALENCE
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
    clinical = measured.clinical
    assert clinical.subgroups["subgroup"].tolist() == ["F", "M"], "no age is known"
    assert clinical.subgroups["warning"].tolist() == ["only 45 patients", "only 15 patients"]
    table = clinical.recalibration.set_index(["model", "method"])
    plain = evaluate(measured.labels, measured.scores["adapted"], measured.patients, resamples=2).loc["mean"]
    assert table.loc[("adapted", "none"), "brier"] == pytest.approx(plain["brier"])
    assert table.loc[("adapted", "none"), "calibration_error"] == pytest.approx(plain["calibration_error"])
    for model, rows in clinical.recalibration.groupby("model"):
        assert rows.loc[rows["validation"].idxmin(), "chosen"] and rows["chosen"].sum() == 1, model
    first = clinical.predictive.iloc[0]
    at = evaluate(measured.labels, measured.scores["base"], measured.patients, 0.6, resamples=2).loc[FINDINGS[0]]
    share, sens, alarms = PREVALENCE[FINDINGS[0]], at["sensitivity"], 1 - at["specificity"]
    assert first["prevalence"] == share
    assert first["ppv"] == pytest.approx(sens * share / (sens * share + alarms * (1 - share)), abs=1e-5)
    assert first["ppv_low"] <= first["ppv"] <= first["ppv_high"]
    assert len(clinical.decision) == 3 * len(MARKED) and len(clinical.predictive) == 36
    crg = clinical.crg.set_index("model")["value"]
    assert crg["difference"] == pytest.approx(crg["adapted"] - crg["base"]) and crg["adapted"] > crg["base"]
    assert clinical.delong.loc["mean", "auroc"] == pytest.approx(measured.difference.loc["mean", "auroc"])


def test_validation_labels_choose_and_test_labels_measure(measured):
    rng = np.random.default_rng(5)
    guessing = statistics(measured, (rng.random((120, 18)) < 0.3).astype(float))
    right = measured.clinical
    said, meant = (c.recalibration.set_index(["model", "method"])["brier"] for c in (guessing, right))
    assert said["adapted", "Platt"] > meant["adapted", "Platt"] + 0.02
    assert said["adapted", "none"] == meant["adapted", "none"]
    pd.testing.assert_frame_equal(guessing.predictive, right.predictive)
    pd.testing.assert_frame_equal(guessing.subgroups, right.subgroups)


def test_metrics_json_has_the_statistics_beside_what_was_there(measured):
    written = json.loads(json.dumps(measured.summary, allow_nan=False))
    assert set(written) - {"clinical"} == set(measurement().summary)
    assert set(written["clinical"]) == {"subgroups", "recalibration", "predictive", "decision", "crg", "delong"}
    assert written["clinical"]["delong"][-1]["finding"] == "mean"


def test_the_report_shows_each_part_and_says_what_follows_from_it(measured):
    page = claims.blocks(measured)
    titles = [block.text for block in page if block.kind == "heading"]
    parts = ["Subgroups", "Calibration made anew", "Predictive values", "Decision curves", "CRG score"]
    assert titles[-len(parts) - 3 : -1] == [*parts, "DeLong's test beside the bootstrap", "What check-lists ask"]
    words, table = report.subgroups(measured.clinical)
    assert "in 0 of 2 subgroups." in words or "in 2 of 2 subgroups: F (" in words or "in 1 of 2 subgroups: " in words
    assert table["warning"].iloc[1] == "only 15 patients" and table["difference"].iloc[0].startswith("+")
    words, table = report.recalibration(measured.clinical)
    assert table["chosen"].tolist().count("yes") == 2 and f"{table['recalibration'][0]}" == "none"
    words, table = report.decision(measured.clinical)
    assert table.columns.tolist() == ["threshold", "nobody", "everybody", "base", "adapted"] and len(table) == len(
        MARKED
    )
    words, table = report.second_test(measured)
    assert table["finding"].tolist() == [*FINDINGS, "mean"]
    assert words.endswith(("alike.", *(f"{name}." for name in [*FINDINGS, "mean"])))
    drawn = figures.decision_curves(measured).axes
    assert len(drawn) == 18 and len(drawn[0].lines) == 4
    without = [block.text for block in claims.blocks(measurement()) if block.kind == "heading"]
    assert "Subgroups" not in without and "What check-lists ask" in without


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
