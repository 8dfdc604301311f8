"""Metrics: equal to scikit-learn, honest intervals, bad input refused."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.calibration import calibration_curve
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    brier_score_loss,
    f1_score,
    recall_score,
    roc_auc_score,
    roc_curve,
)

from medctkit.metrics import bootstrap
from medctkit.metrics import scores as metrics
from medctkit.metrics.bootstrap import holm, mean_of_findings, metric_draws, patient_weights
from medctkit.metrics.scores import METRICS

NAMES = ["a", "b", "c"]


def simulate(seed, n=80, k=3, effect=1.0, patients=None, decimals=2):
    """Labels, scores rounded so that ties occur, and patients."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, k)) < 0.4).astype(float)
    labels[0], labels[1] = 0, 1
    scores = 1 / (1 + np.exp(-rng.normal(size=(n, k)) - effect * (labels - 0.5)))
    return labels, scores.round(decimals), np.arange(n) if patients is None else rng.integers(0, patients, n)


def by_scikit_learn(label, score, limit):
    """All metrics of one finding."""
    said = score >= limit
    shares, means = calibration_curve(label, score, n_bins=10)
    sizes = np.bincount(np.searchsorted(np.linspace(0, 1, 11)[1:-1], score))
    return {
        "auroc": roc_auc_score(label, score),
        "average_precision": average_precision_score(label, score),
        "accuracy": accuracy_score(label, said),
        "balanced_accuracy": balanced_accuracy_score(label, said),
        "f1": f1_score(label, said, zero_division=0),
        "weighted_f1": f1_score(label, said, average="weighted", zero_division=0),
        "sensitivity": recall_score(label, said),
        "specificity": recall_score(label, said, pos_label=0),
        "calibration_error": np.average(np.abs(shares - means), weights=sizes[sizes > 0]),
        "brier": brier_score_loss(label, score),
    }


@given(st.integers(0, 10**6), st.sampled_from([1, 2, 9]), st.sampled_from([0.0, 0.2]), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_point_estimates_are_those_of_scikit_learn(seed, decimals, unknown, limit):
    labels, scores, patients = simulate(seed, decimals=decimals)
    labels[2:][np.random.default_rng(seed).random((78, 3)) < unknown] = np.nan
    table = metrics.evaluate(labels, scores, patients, thresholds=limit, findings=NAMES, resamples=2)
    for k, name in enumerate(NAMES):
        known = ~np.isnan(labels[:, k])
        expected = by_scikit_learn(labels[known, k], scores[known, k], limit)
        assert table.loc[name, list(METRICS)].to_dict() == pytest.approx(expected, abs=1e-6)
        assert table.loc[name, "studies"] == known.sum()
    for metric in METRICS:
        assert np.isclose(table.loc["mean", metric], table.loc[NAMES, metric].mean())


@given(
    st.lists(st.tuples(st.booleans(), st.sampled_from([0, 0.1, 0.25, 0.3, 0.5, 0.7, 1])), min_size=2, max_size=12),
    st.sampled_from([0, 0.1, 0.3, 0.5, 1]),
)
@settings(max_examples=100, deadline=None)
def test_few_studies_ties_and_scores_on_the_edge_of_a_bin_are_scored_as_by_scikit_learn(studies, limit):
    label, score = (np.array(part, dtype=float) for part in zip(*studies, strict=True))
    assume(len(set(label)) == 2)
    found = metric_draws(label[:, None], score[:, None], [limit], np.ones((len(label), 1), np.float32))
    expected = by_scikit_learn(label, score, limit)
    assert {name: values.item() for name, values in found.items()} == pytest.approx(expected, abs=1e-6)


@given(st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_resamples_are_scored_as_repeated_rows_would_be(seed):
    labels, scores, patients = simulate(seed, n=40, patients=15)
    weights = patient_weights(patients, 3, seed)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(bootstrap, "AT_A_TIME", 3)
        values = metric_draws(labels, scores, np.full(3, 0.5), weights)
    for m in range(4):
        rows = np.repeat(np.arange(40), weights[:, m].astype(int))
        for k in range(3):
            if len(set(labels[rows, k])) == 2:
                expected = by_scikit_learn(labels[rows, k], scores[rows, k], 0.5)
                assert {name: values[name][m, k] for name in METRICS} == pytest.approx(expected, abs=1e-6)


def test_a_rare_finding_that_is_never_called_has_a_good_weighted_f1_and_an_f1_of_zero():
    labels = (np.arange(100) < 4).astype(float)[:, None]
    row = metrics.evaluate(labels, np.full((100, 1), 0.1), np.arange(100), findings=["rare"], resamples=10).loc["rare"]
    assert row["weighted_f1"] == pytest.approx(0.96 * 2 * 96 / 196) and row["accuracy"] == pytest.approx(0.96)
    assert row["f1"] == 0 and row["balanced_accuracy"] == 0.5
    assert (row["sensitivity"], row["specificity"], row["average_precision"]) == (0, 1, 0.04)


def test_intervals_cover_the_truth():
    limits, truth = np.full(3, 0.5), {}
    labels, scores, _ = simulate(99, n=100_000, decimals=9)
    for name, values in metric_draws(labels, scores, limits, np.ones((100_000, 1), np.float32)).items():
        truth[name] = values.mean()
    assert truth["auroc"] == pytest.approx(norm.cdf(1 / np.sqrt(2)), abs=0.005)  # two normals one effect apart
    covered = {name: [] for name in METRICS}
    for seed in range(60):
        labels, scores, patients = simulate(seed, n=200, decimals=9)
        table = metrics.evaluate(labels, scores, patients, findings=NAMES, resamples=200, seed=seed).loc[NAMES]
        for name in METRICS:
            covered[name] += list((table[f"{name}_low"] <= truth[name]) & (truth[name] <= table[f"{name}_high"]))
    for name, held in covered.items():
        assert (0.75 if name == "calibration_error" else 0.88) < np.mean(held) <= 1.0, name


def test_the_interval_of_the_calibration_error_leaves_out_what_a_small_sample_adds():
    rng = np.random.default_rng(0)
    truth, held, percentiles = 0.05, 0, 0
    for seed in range(40):
        scores = 0.1 * rng.integers(2, 8, (200, 6)) + 0.05
        labels = (rng.random((200, 6)) < scores + truth).astype(float)
        mean = metrics.evaluate(labels, scores, np.arange(200), findings="abcdef", resamples=200, seed=seed).loc["mean"]
        held += mean["calibration_error_low"] <= truth <= mean["calibration_error_high"]
        draws = metric_draws(labels, scores, np.full(6, 0.5), patient_weights(np.arange(200), 200, 0))
        draws = mean_of_findings(draws["calibration_error"])
        percentiles += np.percentile(draws[1:], 2.5) <= truth
    assert percentiles < 5 < 25 < held


def test_order_does_not_matter_and_copies_of_patients_do_not_narrow_the_interval():
    labels, scores, patients = simulate(3, n=100)
    few = {"findings": NAMES, "resamples": 1000}
    table = metrics.evaluate(labels, scores, patients, **few)
    order = np.random.default_rng(0).permutation(100)
    turned = metrics.evaluate(labels[order], scores[order], patients[order], **few)
    assert np.allclose(table, turned, atol=1e-6, equal_nan=True), "points and intervals"
    twice = metrics.evaluate(np.tile(labels, (2, 1)), np.tile(scores, (2, 1)), np.tile(patients, 2), **few)
    as_new = metrics.evaluate(np.tile(labels, (2, 1)), np.tile(scores, (2, 1)), np.arange(200), **few)
    for name in METRICS:
        wide = lambda t: (t[f"{name}_high"] - t[f"{name}_low"]).loc[NAMES].mean()  # noqa: B023, E731
        assert np.isclose(wide(twice), wide(table), rtol=0.02), name
        assert wide(as_new) < 0.85 * wide(twice), name


def test_the_same_seed_draws_the_same_resamples_in_every_version():
    labels, scores, patients = simulate(7, patients=30)
    mean = metrics.evaluate(labels, scores, patients, findings=NAMES, resamples=1000).loc["mean"]
    golden = {
        "auroc": 0.7506670123857623,
        "auroc_low": 0.6904302558587053,
        "auroc_high": 0.8092638134227783,
        "f1_low": 0.5510401440163454,
        "accuracy_high": 0.7677938133478165,
    }
    assert {name: mean[name] for name in golden} == pytest.approx(golden, rel=1e-9)


def test_paired_differences_find_a_better_model_and_only_that():
    labels, weak, patients = simulate(1, n=300, effect=0.5)
    better = np.clip(weak + 0.25 * (labels - 0.5), 0, 1)
    few = {"findings": NAMES, "resamples": 300}
    table = metrics.compare(labels, weak, better, patients, **few)
    assert table.loc["mean", "auroc_low"] > 0.03 and table.loc["mean", "auroc_p"] < 0.01
    same = metrics.compare(labels, weak, weak, patients, **few)
    for name in METRICS:
        assert (same[[name, f"{name}_low", f"{name}_high"]] == 0).all(axis=None) and (same[f"{name}_p"] == 1).all()
    single = metrics.evaluate(labels, weak, patients, **few)
    both = metrics.evaluate(labels, better, patients, **few)
    assert np.isclose(table.loc["mean", "auroc"], both.loc["mean", "auroc"] - single.loc["mean", "auroc"])
    found = metrics.summary(single, both, table)
    assert found["difference"]["auroc"]["value"] == table.loc["mean", "auroc"]
    assert set(found["base"]) == {"auroc", "accuracy", "macro_f1"}
    assert set(found["base"]["auroc"]) == {"value", "low", "high"}


def test_resamples_that_lack_a_class_do_not_count_as_evidence():
    labels, weak, patients = simulate(0, n=60)
    labels[:, 1] = np.arange(60) == 0  # one positive study: about a third of the resamples have none
    strong = np.clip(weak + 0.2 * (labels - 0.5), 0, 1)
    table = metrics.compare(labels, weak, strong, patients, findings=NAMES, resamples=1000)
    assert 2 / 750 < table.loc["b", "auroc_p"] < 2 / 550
    assert table.loc["a", "auroc_p"] == 2 / 1001
    texts = metrics.p_texts(table)
    assert texts["p"].tolist()[::2] == ["<= 0.002", "<= 0.002"] and texts.loc["mean", "p, Holm"] == "-"
    assert (table.loc["b", "auroc_p"] == table.loc["b", "auroc_p_floor"]) == texts.loc["b", "p"].startswith("<= ")


def test_a_p_value_that_only_the_number_of_resamples_limits_is_printed_as_a_bound_and_so_is_what_follows_from_it():
    p, floor = [0.02, 0.02, 0.025, 0.5, np.nan, 0.02], [0.02, 0.02, 0.02, 0.02, np.nan, 0.02]
    table = pd.DataFrame({"f1_p": p, "f1_p_floor": floor, "f1_p_holm": [*holm(p[:-1]), np.nan]})
    texts = metrics.p_texts(table, "f1")
    assert texts["p"].tolist() == ["<= 0.02", "<= 0.02", "0.025", "0.5", "-", "<= 0.02"]
    # 4 x 0.02, and 2 x 0.025 is below that
    assert texts["p, Holm"].tolist() == ["<= 0.08", "<= 0.08", "<= 0.08", "0.5", "-", "-"]
    sure = metrics.p_texts(table.iloc[2:4], "f1")
    assert not sure.apply(lambda column: column.str.startswith("<=")).any(axis=None), "no p-value at its floor"
    many = metrics.compare(*simulate(0)[:1], *[simulate(0)[1]] * 2, np.arange(80), findings=NAMES)
    assert (many["auroc_p_floor"] == 2 / 10_001).all() and (metrics.p_texts(many)["p"] == "1").all()


def test_holm_by_hand():
    # smallest first: 4 x 0.005, 3 x 0.01, 2 x 0.03, then 1 x 0.04, which may not be below the one before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.01, np.nan, 0.5, 0.9]) == pytest.approx([0.03, np.nan, 1, 1], nan_ok=True)
    assert len(holm([])) == 0


def test_p_values_are_corrected_over_the_findings_and_the_mean_is_one_test():
    labels, weak, patients = simulate(1, n=150)
    labels[:, 1] = 0
    strong = np.clip(weak + 0.1 * (labels - 0.5), 0, 1)
    table = metrics.compare(labels, weak, strong, patients, findings=NAMES, resamples=1000)
    for name in METRICS:
        corrected = table[f"{name}_p_holm"]
        assert np.isnan(corrected["mean"]) and np.isnan(corrected["b"]), "no test, or not one of many"
        two = table[f"{name}_p"].loc[["a", "c"]]
        assert corrected[two.idxmin()] == pytest.approx(min(1, 2 * two.min())), "two tests, the gap is none"
        assert corrected[["a", "c"]].max() == pytest.approx(max(two.max(), min(1, 2 * two.min())))
    assert (table["auroc_p_holm"].loc[["a", "c"]] < 0.05).all()


def test_draws_of_the_mean_are_those_of_the_table():
    labels, scores, patients = simulate(4, patients=30)
    table = metrics.evaluate(labels, scores, patients, 0.4, NAMES, resamples=50, seed=3)
    draws = metrics.mean_draws(labels, scores, patients, NAMES, resamples=50, seed=3)
    ends = [draws[0], *np.percentile(draws[1:], [2.5, 97.5])]
    assert draws.shape == (51,) and ends == list(table.loc["mean", ["auroc", "auroc_low", "auroc_high"]])


def test_thresholds_are_the_roc_point_nearest_the_corner():
    labels, scores, _ = simulate(5, n=200)
    limits = metrics.thresholds_from_validation(labels, scores, NAMES)
    for k in range(3):
        false, true, _ = roc_curve(labels[:, k], scores[:, k])
        said = scores[:, k] >= limits[k]
        here = np.hypot(said[labels[:, k] == 0].mean(), 1 - said[labels[:, k] == 1].mean())
        assert np.isclose(here, np.hypot(false, 1 - true).min())


def test_an_optimistic_table_says_so_whatever_is_printed_of_it():
    labels, scores, patients = simulate(5)
    table = metrics.evaluate(labels, scores, patients, "roc-corner-on-test", NAMES, resamples=10)
    against = metrics.compare(labels, scores, scores, patients, 0.5, "roc-corner-on-test", NAMES, resamples=10)
    said = "optimistic: thresholds were chosen on the labels they are measured on"
    assert table["optimistic"].all() and "optimistic" in table.attrs
    for printed in (table, against):
        chosen = printed[["f1", "f1_low"]].round(3)
        shown = [printed, chosen, chosen.iloc[:2], chosen["f1"], chosen.loc["mean"]]
        assert all(said in str(each) for each in shown)
        assert said in chosen.to_html() and said in chosen.to_csv()
    honest = metrics.evaluate(labels, scores, patients, 0.5, NAMES, resamples=10)
    assert "optimistic" not in honest and honest.index.name == "finding"
    same = metrics.compare(labels, scores, scores, patients, findings=NAMES, resamples=10)
    assert metrics.summary(honest, table, against)["optimistic"] == said
    assert set(metrics.summary(honest, honest, same)) == {"base", "adapted", "difference", "without_a_look"}


def test_what_is_worth_nothing_stands_beside_what_was_measured():
    labels, scores, patients = simulate(6)
    no, yes = (metrics.evaluate(labels, np.full(labels.shape, s), patients, 0.5, NAMES, resamples=2) for s in (0, 1))
    found = metrics.summary(yes, no, metrics.compare(labels, scores, scores, patients, findings=NAMES, resamples=2))
    blind = {"auroc": 0.5, "accuracy": no.loc["mean", "accuracy"], "macro_f1": yes.loc["mean", "f1"]}
    assert found["without_a_look"] == pytest.approx(blind)
    printed = metrics.result_table(found)
    assert f"{blind['accuracy']:.3f}, always no" in printed and f"{blind['macro_f1']:.3f}, always yes" in printed


def test_one_class_is_a_named_gap_not_a_nan_in_the_mean():
    labels, scores, patients = simulate(2)
    labels[:, 1] = 0
    table = metrics.evaluate(labels, scores, patients, findings=NAMES, resamples=50)
    assert list(table.attrs["gaps"]) == ["b"] and np.isnan(table.loc["b", "auroc"])
    assert np.isclose(table.loc["mean", "auroc"], table.loc[["a", "c"], "auroc"].mean())
    assert table.loc["mean"].drop("threshold").notna().all()
    assert table.loc["b", [*METRICS, "auroc_low"]].isna().all()
    assert table.attrs["gaps"]["b"] == "one class only, so no AUROC; left out of the means"
    labels[:, 1] = np.nan
    gaps = metrics.evaluate(labels, scores, patients, findings=NAMES, resamples=50).attrs["gaps"]
    assert gaps == {"b": "no known label, so no AUROC; left out of the means"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, s, p: (a[:, :2], s, p), r"labels have shape \(80, 2\), expected \(n, 3\)"),
        (lambda a, s, p: (a, s[:-1], p), "scores have shape"),
        (lambda a, s, p: (a, ["n/a"], p), r"scores have shape \(1,\), labels \(80, 3\)"),
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


def test_comparing_names_the_scores_that_are_wrong_and_bad_thresholds_are_refused():
    labels, scores, patients = simulate(0)
    with pytest.raises(ValueError, match="scores_b: study 0, finding 'a' is"):
        metrics.compare(labels, scores, scores - 2, patients, findings=NAMES)
    for thresholds in (1.5, [0.5, 0.5], "best"):
        with pytest.raises(ValueError, match="thresholds="):
            metrics.evaluate(labels, scores, patients, thresholds=thresholds, findings=NAMES)


def as_tables(labels, scores, patients):
    index = pd.Index([f"study{i:02}" for i in range(len(labels))])
    labels, scores = (pd.DataFrame(part, index, columns=NAMES) for part in (labels, scores))
    return labels, scores, pd.Series(patients, index)


def test_pandas_tables_are_scored_as_their_arrays_are_whatever_says_unknown():
    labels, scores, patients = simulate(0)
    labels[3, 1] = np.nan
    expected = metrics.evaluate(labels, scores, patients, findings=NAMES, resamples=20)
    tables = as_tables(labels, scores, patients)
    for given_labels in (tables[0], tables[0].astype("Int64"), tables[0].astype(object).where(tables[0].notna(), None)):
        found = metrics.evaluate(given_labels, *tables[1:], findings=NAMES, resamples=20)
        pd.testing.assert_frame_equal(found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, s, p: (a, s[::-1], p), "study 0 is 'study00' in the index of labels, 'study79' in that of scores"),
        (lambda a, s, p: (a, s, p[::-1]), "study 0 is 'study00' in the index of labels, 'study79' in that of patients"),
        (lambda a, s, p: (a.to_numpy(), s, p[::-1]), "study 0 is 'study00' in the index of scores"),
        (
            lambda a, s, p: (a, s[["a", "c", "b"]], p),
            r"scores have columns \['a', 'c', 'b'\], expected \['a', 'b', 'c'\]",
        ),
        (
            lambda a, s, p: (a.astype(object).replace(1, "yes"), s, p),
            "labels: study 1, finding 'a' is 'yes'; expected 0",
        ),
        (
            lambda a, s, p: (a, s.astype(object).where(s < 0.9, "n/a"), p),
            "scores: study .* is 'n/a'; expected probabil",
        ),
    ],
)
def test_tables_in_another_order_or_with_words_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        metrics.evaluate(*change(*as_tables(*simulate(0))), findings=NAMES)
