"""Metrics: equal to scikit-learn, honest intervals, bad input refused."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score, roc_curve

from medctkit import metrics

NAMES = ["a", "b", "c"]


def simulate(seed, n=80, k=3, effect=1.0, patients=None, decimals=2):
    """Labels, scores rounded so that ties occur, and patients."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, k)) < 0.4).astype(float)
    labels[0], labels[1] = 0, 1
    scores = 1 / (1 + np.exp(-rng.normal(size=(n, k)) - effect * (labels - 0.5)))
    return labels, scores.round(decimals), np.arange(n) if patients is None else rng.integers(0, patients, n)


@given(st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_point_estimates_are_those_of_scikit_learn(seed):
    labels, scores, patients = simulate(seed)
    table = metrics.evaluate(labels, scores, patients, thresholds=0.55, findings=NAMES, resamples=20)
    for k, name in enumerate(NAMES):
        said = scores[:, k] >= 0.55
        assert np.isclose(table.loc[name, "auroc"], roc_auc_score(labels[:, k], scores[:, k]))
        assert np.isclose(table.loc[name, "accuracy"], accuracy_score(labels[:, k], said))
        assert np.isclose(table.loc[name, "f1"], f1_score(labels[:, k], said, zero_division=0))
    for metric in metrics.METRICS:
        assert np.isclose(table.loc["mean", metric], table.loc[NAMES, metric].mean())


@given(st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_resamples_are_scored_as_repeated_rows_would_be(seed):
    labels, scores, patients = simulate(seed, n=40, patients=15)
    weights = metrics._weights(patients, 3, seed)
    values = metrics._metrics(labels, scores, np.full(3, 0.5), weights)
    for m in range(4):
        rows = np.repeat(np.arange(40), weights[:, m].astype(int))
        for k in range(3):
            if len(set(labels[rows, k])) == 2:
                assert np.isclose(values["auroc"][m, k], roc_auc_score(labels[rows, k], scores[rows, k]))
                assert np.isclose(
                    values["f1"][m, k], f1_score(labels[rows, k], scores[rows, k] >= 0.5, zero_division=0)
                )
                assert np.isclose(values["accuracy"][m, k], accuracy_score(labels[rows, k], scores[rows, k] >= 0.5))


def test_intervals_cover_the_truth():
    effect = 1.0
    truth = norm.cdf(effect / np.sqrt(2))  # AUROC of two normals one effect apart
    covered = []
    for seed in range(60):
        labels, scores, patients = simulate(seed, n=120, effect=effect, decimals=9)
        table = metrics.evaluate(labels, scores, patients, findings=NAMES, resamples=200, seed=seed)
        covered += [table.loc[n, "auroc_low"] <= truth <= table.loc[n, "auroc_high"] for n in NAMES]
    assert 0.88 < np.mean(covered) <= 1.0


def test_order_does_not_matter_and_copies_of_patients_do_not_narrow_the_interval():
    labels, scores, patients = simulate(3, n=100)
    table = metrics.evaluate(labels, scores, patients, findings=NAMES)
    order = np.random.default_rng(0).permutation(100)
    turned = metrics.evaluate(labels[order], scores[order], patients[order], findings=NAMES)
    assert np.allclose(table["auroc"], turned["auroc"])
    twice = metrics.evaluate(np.tile(labels, (2, 1)), np.tile(scores, (2, 1)), np.tile(patients, 2), findings=NAMES)
    as_new = metrics.evaluate(np.tile(labels, (2, 1)), np.tile(scores, (2, 1)), np.arange(200), findings=NAMES)
    wide = lambda t: (t["auroc_high"] - t["auroc_low"]).iloc[:3].mean()  # noqa: E731
    assert np.isclose(wide(twice), wide(table), rtol=0.02)
    assert wide(as_new) < 0.85 * wide(twice)


def test_paired_differences_find_a_better_model_and_only_that():
    labels, weak, patients = simulate(1, n=300, effect=0.5)
    better = np.clip(weak + 0.25 * (labels - 0.5), 0, 1)
    table = metrics.compare(labels, weak, better, patients, findings=NAMES)
    assert table.loc["mean", "auroc_low"] > 0.03 and table.loc["mean", "auroc_p"] < 0.01
    same = metrics.compare(labels, weak, weak, patients, findings=NAMES)
    assert (same[["auroc", "auroc_low", "auroc_high"]] == 0).all(axis=None) and (same["auroc_p"] == 1).all()
    single = metrics.evaluate(labels, weak, patients, findings=NAMES)
    both = metrics.evaluate(labels, better, patients, findings=NAMES)
    assert np.isclose(table.loc["mean", "auroc"], both.loc["mean", "auroc"] - single.loc["mean", "auroc"])
    found = metrics.summary(single, both, table)
    assert found["difference"]["auroc"]["value"] == table.loc["mean", "auroc"]
    assert set(found["base"]) == {"auroc", "accuracy", "macro_f1"} and set(found["base"]["auroc"]) == {
        "value",
        "low",
        "high",
    }


def test_resamples_that_lack_a_class_do_not_count_as_evidence():
    labels, weak, patients = simulate(0, n=60)
    labels[:, 1] = np.arange(60) == 0  # one positive study: about a third of the resamples have none
    strong = np.clip(weak + 0.2 * (labels - 0.5), 0, 1)
    table = metrics.compare(labels, weak, strong, patients, findings=NAMES)
    assert 2 / 750 < table.loc["b", "auroc_p"] < 2 / 550
    assert table.loc["a", "auroc_p"] == 2 / 1001


def test_the_size_of_ct_rates_validation_set_takes_seconds():
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 2, (3039, 18)), rng.random((3039, 18))
    start = time.process_time()
    table = metrics.evaluate(labels, scores, rng.integers(0, 1304, 3039), resamples=1000)
    assert time.process_time() - start < 5
    assert table.shape[0] == 19


def test_thresholds_are_the_roc_point_nearest_the_corner():
    labels, scores, _ = simulate(5, n=200)
    limits = metrics.thresholds_from_validation(labels, scores, NAMES)
    for k in range(3):
        false, true, _ = roc_curve(labels[:, k], scores[:, k])
        said = scores[:, k] >= limits[k]
        here = np.hypot(said[labels[:, k] == 0].mean(), 1 - said[labels[:, k] == 1].mean())
        assert np.isclose(here, np.hypot(false, 1 - true).min())


def test_thresholds_on_test_are_available_and_marked():
    labels, scores, patients = simulate(5)
    table = metrics.evaluate(labels, scores, patients, "roc-corner-on-test", NAMES, resamples=10)
    assert table["optimistic"].all() and "optimistic" in table.attrs
    assert "optimistic" not in metrics.evaluate(labels, scores, patients, 0.5, NAMES, resamples=10)


def test_one_class_is_a_named_gap_not_a_nan_in_the_mean():
    labels, scores, patients = simulate(2)
    labels[:, 1] = 0
    table = metrics.evaluate(labels, scores, patients, findings=NAMES, resamples=50)
    assert list(table.attrs["gaps"]) == ["b"] and np.isnan(table.loc["b", "auroc"])
    assert np.isclose(table.loc["mean", "auroc"], table.loc[["a", "c"], "auroc"].mean())
    assert table.loc["mean", ["auroc_low", "auroc_high"]].notna().all()


def test_unknown_labels_are_left_out():
    labels, scores, patients = simulate(2)
    labels[5:20, 0] = np.nan
    table = metrics.evaluate(labels, scores, patients, findings=NAMES, resamples=10)
    known = ~np.isnan(labels[:, 0])
    assert np.isclose(table.loc["a", "auroc"], roc_auc_score(labels[known, 0], scores[known, 0]))
    assert table.loc["a", "studies"] == known.sum()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, s, p: (a[:, :2], s, p), r"labels have shape \(80, 2\), expected \(n, 3\)"),
        (lambda a, s, p: (a, s[:-1], p), "scores have shape"),
        (lambda a, s, p: (a, s, p[:-1]), "patients have shape"),
        (lambda a, s, p: (a, s, np.array([*p[:-1], None])), "patients: study 79 has none"),
        (lambda a, s, p: (a, s, p * 0), "all studies are of one patient"),
        (lambda a, s, p: (a + (a == 1), s, p), "labels: study .*, finding '.' is 2.0; expected 0, 1 or NaN"),
        (lambda a, s, p: (a, s * 3, p), "scores: study .* expected probabilities"),
        (lambda a, s, p: (a, s * np.nan, p), "scores: study 0, finding 'a' is nan"),
    ],
)
def test_bad_input_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        metrics.evaluate(*change(*simulate(0)), findings=NAMES)


def test_comparing_names_the_scores_that_are_wrong():
    labels, scores, patients = simulate(0)
    with pytest.raises(ValueError, match="scores_b: study 0, finding 'a' is"):
        metrics.compare(labels, scores, scores - 2, patients, findings=NAMES)


@pytest.mark.parametrize("thresholds", [1.5, [0.5, 0.5], "best"])
def test_bad_thresholds_are_refused(thresholds):
    with pytest.raises(ValueError, match="thresholds="):
        metrics.evaluate(*simulate(0), thresholds=thresholds, findings=NAMES)
