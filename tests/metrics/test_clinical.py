"""Clinical statistics against their definitions: written out once more, by hand, the slow way."""

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit
from scipy.stats import norm
from sklearn.metrics import brier_score_loss, roc_auc_score

from medctkit.metrics import clinical
from medctkit.metrics.bootstrap import auroc_draws, metric_draws, patient_weights

NAMES = ("a", "b", "c")


def some(n=300, seed=0, known=0.9):
    """Labels with gaps, two models of which the second is better, and patients with two studies each."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, 3)) < (0.2, 0.4, 0.6)).astype(float)
    labels[rng.random((n, 3)) > known] = np.nan
    first, second = (
        np.clip(0.5 + s * (np.nan_to_num(labels) - 0.5) + rng.normal(0, 0.2, (n, 3)), 0, 1) for s in (0.1, 0.3)
    )
    return labels, first.round(2), second.round(2), np.arange(n) // 2


def test_auroc_draws_are_those_of_all_metrics():
    labels, scores, _, patients = some()
    weights = patient_weights(patients, 30, 0)
    expected = metric_draws(labels, scores, np.full(3, 0.5), weights)["auroc"]
    np.testing.assert_array_equal(auroc_draws(labels, scores, weights), expected)


@pytest.mark.parametrize("method", ["Platt", "isotonic"])
def test_recalibration_is_fitted_on_validation_and_mends_what_can_be_mended(method):
    rng = np.random.default_rng(1)
    truth = rng.random((4000, 2))
    labels, shown = (rng.random((4000, 2)) < truth).astype(float), truth**4 / (truth**4 + (1 - truth) ** 4)
    old, new = slice(0, 2000), slice(2000, None)
    mended = clinical.recalibrated(method, labels[old], shown[old], shown[new])
    ideal, before, after = (brier_score_loss(labels[new, 0], x[:, 0]) for x in (truth[new], shown[new], mended))
    assert after < ideal + 0.1 * (before - ideal)
    order = np.argsort(shown[new, 0])
    assert (np.diff(mended[order, 0]) >= 0).all(), "the order of scores stays"
    chosen = clinical.choose_recalibration(labels[old], shown[old], np.arange(2000))
    alone = clinical.choose_recalibration(labels[old], shown[old], np.zeros(2000))
    assert min(alone, key=alone.__getitem__) == "none" and alone["none"] == pytest.approx(chosen["none"])
    assert chosen["none"] > chosen[method] and set(chosen) == set(clinical.RECALIBRATIONS)


@pytest.mark.parametrize("scale", [5, 1e-2, 1e-4])
def test_platts_curve_is_the_same_whatever_the_temperature_of_the_scores(scale):
    rng = np.random.default_rng(0)
    labels = (rng.random((400, 1)) < 0.3).astype(float)
    margins = rng.normal(labels, 1 / 3)
    found, expected = (clinical.recalibrated("Platt", labels, x, x) for x in (expit(scale * margins), expit(margins)))
    np.testing.assert_allclose(found, expected, atol=5e-3)


def test_recalibration_leaves_alone_what_it_cannot_learn_and_does_not_see_the_test():
    labels, scores, new, _ = some()
    one_class = labels.copy()
    one_class[:, 1] = np.where(np.isnan(labels[:, 1]), np.nan, 0)
    found = clinical.recalibrated("isotonic", one_class, scores, new)
    np.testing.assert_array_equal(found[:, 1], new[:, 1])
    assert not np.allclose(found[:, 0], new[:, 0])
    np.testing.assert_array_equal(clinical.recalibrated("none", labels, scores, new), new)
    half = clinical.recalibrated("isotonic", one_class, scores, new[:50])
    np.testing.assert_array_equal(half, found[:50])
    with pytest.raises(ValueError, match="method='platt': expected one of none, Platt, isotonic"):
        clinical.recalibrated("platt", labels, scores, new)


def test_net_benefit_counts_hits_and_alarms_at_their_price_on_every_resample():
    labels, scores, _, patients = some()
    weights, at = patient_weights(patients, 4, 0), (0.2, 0.5)
    found = clinical.net_benefit(labels, scores, at, weights)
    for m, k, (i, t) in ((m, k, it) for m in range(5) for k in range(3) for it in enumerate(at)):
        rows = np.repeat(np.arange(len(labels)), weights[:, m].astype(int))
        rows = rows[~np.isnan(labels[rows, k])]
        y, said = labels[rows, k], scores[rows, k] >= t
        expected = np.mean(said * y) - np.mean(said * (1 - y)) * t / (1 - t)
        assert found[m, i, k] == pytest.approx(expected)
    everybody = clinical.net_benefit(labels, np.ones_like(scores), [np.nanmean(labels[:, 0])], weights[:, :1])
    assert everybody[0, 0, 0] == pytest.approx(0), "at the prevalence, acting on all is worth acting on none"


def test_predictive_values_are_bayes_rule():
    ppv, npv = clinical.predictive_values([0.9, 0.0], [0.8, 1.0], [0.1, 0.1])
    assert ppv[0] == pytest.approx(0.09 / (0.09 + 0.18)) and npv[0] == pytest.approx(0.72 / 0.73)
    assert np.isnan(ppv[1]) and npv[1] == pytest.approx(0.9)


@pytest.mark.parametrize(("said", "value"), [("right", 1), ("all", 1 / 3), ("none", 1 / 3)])
def test_the_crg_score_has_its_marks(said, value):
    labels = some()[0]
    answers = {"right": labels == 1, "all": np.ones(labels.shape, bool), "none": np.zeros(labels.shape, bool)}[said]
    assert clinical.crg_score(labels, answers, np.ones((len(labels), 1)))[0] == pytest.approx(value)


def test_the_crg_score_is_the_formula_of_its_paper_on_every_resample():
    labels, scores, _, patients = some()
    weights = patient_weights(patients, 3, 0)
    for m, found in enumerate(clinical.crg_score(labels, scores >= 0.5, weights)):
        rows = np.repeat(np.arange(len(labels)), weights[:, m].astype(int))
        y, said = labels[rows], scores[rows] >= 0.5
        tp, fn, fp = (np.sum(x) for x in (said & (y == 1), ~said & (y == 1), said & (y == 0)))
        x, a = np.sum(~np.isnan(y)), np.sum(y == 1)
        r = (x - a) / (2 * a)
        assert found == pytest.approx(r * a / (2 * r * a - (r * tp - r * fn - fp)))


def test_delong_is_its_definition_where_patients_have_one_study():
    labels, a, b, _ = some()
    found = clinical.delong(labels, a, b, np.arange(len(labels)), NAMES)
    for k, name in enumerate(NAMES):
        sick, well = labels[:, k] == 1, labels[:, k] == 0
        kernels = []
        for scores in (a[:, k], b[:, k]):
            margin = scores[sick][:, None] - scores[well][None]
            kernels.append((margin > 0) + 0.5 * (margin == 0))
        difference = kernels[1] - kernels[0]
        variance = sum(np.var(difference.mean(i), ddof=1) / difference.shape[1 - i] for i in (0, 1))
        value = roc_auc_score(labels[sick | well, k], b[sick | well, k]) - kernels[0].mean()
        row = found.loc[name]
        assert row["auroc"] == pytest.approx(value)
        assert row["auroc_high"] - value == pytest.approx(1.959964 * np.sqrt(variance))
        assert row["auroc_p"] == pytest.approx(2 * norm.sf(abs(value) / np.sqrt(variance)))
    assert found.loc["mean", "auroc"] == pytest.approx(found["auroc"][:-1].mean())


def test_delong_counts_patients_not_their_studies():
    """Obuchowski's variance written out, for patients who are sick or well in all of their studies."""
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(9), rng.integers(1, 6, 9))
    labels, a, b = (patients < 3)[:, None].astype(float), *rng.random((2, len(patients), 1)).round(1)
    sick, variance = labels[:, 0] == 1, 0.0
    margins = (x[sick] - x[~sick].T for x in (a, b))
    first, second = ((margin > 0) + 0.5 * (margin == 0) for margin in margins)
    for axis, of in ((1, patients[sick]), (0, patients[~sick])):
        share = (second - first).mean(axis)
        sums = np.bincount(of, share - share.mean())[np.unique(of)]
        variance += len(sums) / (len(sums) - 1) * np.sum(sums**2) / len(of) ** 2
    row = clinical.delong(labels, a, b, patients, ["a"]).loc["a"]
    assert row["auroc_high"] - row["auroc"] == pytest.approx(1.959964 * np.sqrt(variance))
    alone = clinical.delong((patients == 2)[:, None].astype(float), a, b, patients, ["a"])
    assert (patients == 2).sum() > 1 and alone.isna().all(axis=None), "all who are sick are one patient"


def test_delong_agrees_with_the_bootstrap_and_is_not_impressed_by_repetition():
    labels, a, b, patients = some(600)
    found = clinical.delong(labels, a, b, patients, NAMES)
    weights = patient_weights(patients, 2000, 0)
    draws = auroc_draws(labels, b, weights) - auroc_draws(labels, a, weights)
    width = found["auroc_high"] - found["auroc_low"]
    np.testing.assert_allclose(width[:-1], 2 * 1.96 * draws[1:].std(0), rtol=0.1)
    assert width["mean"] == pytest.approx(2 * 1.96 * draws[1:].mean(1).std(), rel=0.1)
    twice = [np.concatenate([x, x]) for x in (labels, a, b, patients)]
    again = clinical.delong(*twice, NAMES)
    np.testing.assert_allclose(again["auroc_high"] - again["auroc_low"], width, rtol=0.02)
    same = clinical.delong(labels, a, a, patients, NAMES)
    assert (same["auroc"] == 0).all() and (same["auroc_p"] == 1).all()


def test_a_finding_with_one_class_has_no_delong_test_and_no_part_in_the_mean():
    labels, a, b, patients = some()
    whole = clinical.delong(labels[:, :2], a[:, :2], b[:, :2], patients, NAMES[:2])
    labels[:, 2] = 0
    found = clinical.delong(labels, a, b, patients, NAMES)
    assert found.loc["c"].isna().all()
    pd.testing.assert_series_equal(found.loc["mean"], whole.loc["mean"])


def test_subgroups_have_their_own_auroc_and_a_warning_where_they_are_small():
    labels, a, b, patients = some(400, known=1)
    sex, kernel = np.where(patients % 2, "F", "M"), np.where(patients < 10, "rare", "")
    worse = np.where((sex == "F")[:, None], a, b)  # the second model fails in women
    labels[kernel == "rare", 2] = 1
    groups = pd.DataFrame({"sex": sex, "kernel": kernel})
    table = clinical.subgroup_table(labels, {"base": a, "adapted": worse}, patients, groups, 200)
    table = table.set_index("subgroup")
    assert table.index.tolist() == ["F", "M", "rare"] and table["studies"].tolist() == [200, 200, 20]
    inside = sex == "M"
    expected = np.mean([roc_auc_score(labels[inside, k], worse[inside, k]) for k in range(3)])
    assert table.loc["M", "adapted"] == pytest.approx(expected)
    assert table.loc["F", "difference"] == 0 and table.loc["F", "against the rest_high"] < 0
    assert table.loc["M", "against the rest"] == pytest.approx(-table.loc["F", "against the rest"])
    assert (table.loc[["F", "M"], "warning"] == "").all()
    assert table.loc["rare", "warning"] == "only 10 patients; 1 of 3 findings have one class only"
    assert np.isnan(table.loc["rare", "against the rest"]), "nobody is known to be in the rest"
