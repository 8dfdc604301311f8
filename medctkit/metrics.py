"""How good the scores are, and how sure we can be: nine metrics, with a bootstrap over patients.

What each of `METRICS` is, for one finding:

- `auroc`: share of pairs of a positive and a negative study that the scores put in the right order, ties half.
- `average_precision`: mean precision over the positive studies, each at its own score as threshold.
- `accuracy`: share of studies called right. High for a rare finding that is never called.
- `balanced_accuracy`: mean of sensitivity and specificity.
- `f1`: harmonic mean of sensitivity and precision; its mean over findings is the macro-F1.
- `weighted_f1`: F1 of the positive and of the negative class, averaged by their numbers of studies; this is the F1 of
  the CT-CLIP papers, mostly that of the negative class where a finding is rare. Not to be compared with `f1`.
- `sensitivity`: share of positive studies called positive.
- `specificity`: share of negative studies called negative.
- `calibration_error`: expected calibration error of the positive class in ten bins of equal width (Naeini et al., AAAI
  2015): mean distance of the mean score from the share of positives, bins weighted by their studies.

Point estimates are scikit-learn's. Intervals resample patients with all their studies, because two scans of
one patient are not two independent facts; all resamples are scored at once from counts (`_ranked`,
`_counted`, `_calibration`), which a test holds equal to scikit-learn on repeated rows.

Intervals are percentiles of the resamples, but for the calibration error. That is too large in small samples, and
larger again in resamples of them; its draws are mirrored at the estimate (the basic bootstrap interval; Davison and
Hinkley, Bootstrap Methods and their Application, 1997, chapter 5), which takes the excess off. Its interval can so lie
below its estimate, and for nearly perfect calibration, where noise is all there is, it is still too high.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from medctkit.findings import FINDINGS

if TYPE_CHECKING:
    import pandas as pd

    from medctkit.zero_shot import Embedded

METRICS = (
    "auroc",
    "average_precision",
    "accuracy",
    "balanced_accuracy",
    "f1",
    "weighted_f1",
    "sensitivity",
    "specificity",
    "calibration_error",
)
BINS = 10  # of the calibration error
ON_TEST = "roc-corner-on-test"
OPTIMISTIC = "optimistic: thresholds were chosen on the labels they are measured on"
LEVEL = (2.5, 97.5)  # percentiles of a 95 % interval


def evaluate(
    labels,
    scores,
    patients,
    thresholds: float | Sequence[float] | str = 0.5,
    findings: Sequence[str] = FINDINGS,
    resamples: int = 1000,
    seed: int = 0,
) -> "pd.DataFrame":
    """Score each finding and their mean, with 95 % intervals over patients.

    Args:
        labels: (n, k) of 0 and 1; NaN where unknown. Of pandas tables, the columns must be `findings` and the indexes
            of labels, scores and patients the same.
        scores: (n, k) probabilities in [0, 1].
        patients: (n,) names; studies of one patient are drawn together.
        thresholds: at which a score counts as positive: one number, one for each finding (from
            `thresholds_from_validation`), or "roc-corner-on-test", which is how the public CT-CLIP code does it.
            That chooses on the very labels it is measured on: optimistic, and marked so in the result.
        findings: k names.
        resamples: bootstrap resamples of patients.
        seed: of the bootstrap.

    Returns:
        A row for each finding and "mean", indexed by name: each of `METRICS` with _low and _high; threshold, positives,
        studies. A finding with one class only has no AUROC: its row is empty, it is left out of the means, and
        `.attrs["gaps"]` names it. Optimistic tables say so in a column, above their columns and their index, and in
        `.attrs["optimistic"]`; AUROC, average precision and calibration error need no threshold and are not affected.

    Raises:
        ValueError: shapes or orders that do not fit, labels other than 0, 1 and NaN, scores outside [0, 1]; says where.
    """
    labels, scores, patients = _check(labels, scores, patients, findings)
    limits, optimistic = _thresholds(labels, scores, thresholds)
    weights = _weights(patients, resamples, seed)
    values = _metrics(labels, scores, limits, weights)
    return _table(values, labels, limits, findings, optimistic)


def compare(
    labels,
    scores_a,
    scores_b,
    patients,
    thresholds_a=0.5,
    thresholds_b=0.5,
    findings: Sequence[str] = FINDINGS,
    resamples: int = 1000,
    seed: int = 0,
) -> "pd.DataFrame":
    """What model b does better than model a on the same studies: paired differences, b minus a.

    Both models are scored on the same resamples of patients, so that what makes a resample easy for both drops
    out. `*_p` is a two-sided bootstrap p-value for no difference, at least 2 / (resamples + 1); `*_p_holm` is corrected
    over the findings, k times that at least: more findings need more resamples.

    Args and errors are those of `evaluate`, with scores and thresholds for each model.

    Returns:
        A row for each finding and "mean": each of `METRICS` with _low, _high, _p and _p_holm, see `holm`. The mean is
        one test and has no _p_holm.
    """
    _, scores_b, _ = _check(labels, scores_b, patients, findings, "scores_b")
    labels, scores_a, patients = _check(labels, scores_a, patients, findings, "scores_a")
    weights = _weights(patients, resamples, seed)
    limits_a, optimistic_a = _thresholds(labels, scores_a, thresholds_a)
    limits_b, optimistic_b = _thresholds(labels, scores_b, thresholds_b)
    a, b = _metrics(labels, scores_a, limits_a, weights), _metrics(labels, scores_b, limits_b, weights)
    difference = {name: b[name] - a[name] for name in METRICS}
    table = _table(difference, labels, None, findings, optimistic_a or optimistic_b)
    for name in METRICS:
        drawn = _drawn(name, difference[name])[1:]
        tail = np.minimum((drawn <= 0).sum(0), (drawn >= 0).sum(0))
        used = (~np.isnan(drawn)).sum(0)  # a rare finding may lack a class in some resamples
        p = np.minimum(1.0, 2 * (tail + 1) / (used + 1))
        p = np.where(np.isnan(table[name]), np.nan, p)
        table[f"{name}_p"], table[f"{name}_p_holm"] = p, [*holm(p[:-1]), np.nan]
    return table


def holm(p: Sequence[float]) -> np.ndarray:
    """P-values corrected for being many tests (Holm, Scand. J. Statist. 6, 1979); a NaN is no test and stays NaN."""
    p = np.asarray(p, dtype=float)
    corrected, order = np.full(len(p), np.nan), np.argsort(p)[: (~np.isnan(p)).sum()]  # NaNs are sorted last
    left = np.arange(len(order), 0, -1)  # tests not yet rejected
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * left))
    return corrected


def mean_draws(
    labels,
    scores,
    patients,
    metric: str = "auroc",
    thresholds: float | Sequence[float] | str = 0.5,
    findings: Sequence[str] = FINDINGS,
    resamples: int = 1000,
    seed: int = 0,
) -> np.ndarray:
    """A metric's mean over findings on the data as it is, then on each resample of patients: (1 + resamples,).

    Resample i is the same for all scores of the same studies, so draws can be subtracted and averaged. The intervals
    of `evaluate` are percentiles of these (of the mirrored ones for the calibration error).

    Args and errors are those of `evaluate`; `metric` is one of `METRICS`.
    """
    if metric not in METRICS:
        raise ValueError(f"metric={metric!r}: expected one of {', '.join(METRICS)}")
    labels, scores, patients = _check(labels, scores, patients, findings)
    limits, _ = _thresholds(labels, scores, thresholds)
    return _mean(_metrics(labels, scores, limits, _weights(patients, resamples, seed))[metric])


def thresholds_from_validation(labels, scores, findings: Sequence[str] = FINDINGS) -> np.ndarray:
    """For each finding the threshold whose ROC point lies nearest the corner (0, 1), from validation studies.

    The criterion is the public CT-CLIP code's, which applies it to the test labels; here it never sees them.
    A finding with one class in the validation data keeps 0.5.

    Returns:
        (k,) thresholds.
    """
    labels, scores, _ = _check(labels, scores, np.arange(len(labels)), findings)
    return _roc_corner(labels, scores)


def summary(base: "pd.DataFrame", adapted: "pd.DataFrame", difference: "pd.DataFrame") -> dict:
    """The means of two evaluations and their comparison, as `make demo` writes them to metrics.json.

    Returns:
        {base, adapted, difference} -> {auroc, accuracy, macro_f1} -> {value, low, high}; "optimistic" and why, if one
        of the tables is.
    """
    names = {"auroc": "auroc", "accuracy": "accuracy", "macro_f1": "f1"}
    tables = {"base": base, "adapted": adapted, "difference": difference}
    found = {
        key: {
            shown: {end: float(table.loc["mean", name + suffix]) for end, suffix in _ENDS.items()}
            for shown, name in names.items()
        }
        for key, table in tables.items()
    }
    return found | ({"optimistic": OPTIMISTIC} if any("optimistic" in table for table in tables.values()) else {})


def same_studies(a: "Embedded", b: "Embedded") -> None:
    """Make sure that two models saw the same studies in the same order, so that their scores can be compared.

    Raises:
        ValueError: names the first study where names, patients or labels differ.
    """
    if len(a.studies) != len(b.studies):
        raise ValueError(f"one model saw {len(a.studies)} studies, the other {len(b.studies)}: embed the same data set")
    labels_a, labels_b = np.asarray(a.labels, dtype=float), np.asarray(b.labels, dtype=float)
    if labels_a.shape != labels_b.shape:
        raise ValueError(f"labels have shape {labels_a.shape} for one model, {labels_b.shape} for the other")
    other_labels = (labels_a != labels_b) & ~(np.isnan(labels_a) & np.isnan(labels_b))
    for what, different in (
        ("name", np.asarray(a.studies) != np.asarray(b.studies)),
        ("patient", np.asarray(a.patients) != np.asarray(b.patients)),
        ("labels", other_labels.any(1)),
    ):
        if different.any():
            row = int(different.argmax())
            one, two = ((e.studies[row], e.patients[row], e.labels[row].tolist()) for e in (a, b))
            raise ValueError(
                f"study {row} has another {what} for each model: (study, patient, labels) is {one} and {two}. "
                "Embed the same data set in the same order"
            )


_ENDS = {"value": "", "low": "_low", "high": "_high"}


def _check(labels, scores, patients, findings, called="scores"):
    """Arrays that fit together, or an error that says what does not."""
    import pandas as pd

    _check_order({"labels": labels, called: scores, "patients": patients}, findings)
    labels, scores = _numbers("labels", labels, findings), _numbers(called, scores, findings)
    patients = np.asarray(patients)
    if labels.ndim != 2 or labels.shape[1] != len(findings) or not len(labels):
        raise ValueError(f"labels have shape {labels.shape}, expected (n, {len(findings)}), n at least 1")
    if scores.shape != labels.shape:
        raise ValueError(f"{called} have shape {scores.shape}, labels {labels.shape}: they must be the same")
    if patients.shape != (len(labels),):
        raise ValueError(f"patients have shape {patients.shape}, expected ({len(labels)},): one name for each study")
    if pd.isna(patients).any():
        raise ValueError(f"patients: study {int(pd.isna(patients).argmax())} has none; every study needs its patient")
    for name, values, fine, expected in (
        ("labels", labels, np.isin(labels, (0, 1)) | np.isnan(labels), _EXPECTED["labels"]),
        (called, scores, (scores >= 0) & (scores <= 1), _EXPECTED["scores"]),
    ):
        if not fine.all():
            row, column = np.argwhere(~fine)[0]
            raise ValueError(
                f"{name}: study {row}, finding {findings[column]!r} is {values[row, column]}; expected {expected}"
            )
    return labels, scores, patients


_EXPECTED = {"labels": "0, 1 or NaN (unknown)", "scores": "probabilities from 0 to 1"}


def _check_order(given: dict, findings) -> None:
    """What pandas knows of the order of studies and findings must agree: as arrays, tables lose their names."""
    tables = {name: value for name, value in given.items() if hasattr(value, "iloc")}
    for name, table in tables.items():
        columns = list(getattr(table, "columns", findings))
        if columns != list(findings):
            raise ValueError(f"{name} have columns {columns}, expected {list(findings)}, in that order")
    first, *others = tables or [None]
    for name in others:
        one, two = tables[first].index, tables[name].index
        if len(one) == len(two) and not one.equals(two):
            row = next(i for i in range(len(one)) if one[i] != two[i])
            raise ValueError(
                f"study {row} is {one[row]!r} in the index of {first}, {two[row]!r} in that of {name}: bring both into "
                "one order, or give arrays (.to_numpy()) if the order is the same and only the names differ"
            )


def _numbers(called: str, values, findings) -> np.ndarray:
    import pandas as pd

    values = np.asarray(values)
    if values.dtype.kind in "biuf" or values.ndim != 2:
        return values.astype(float)
    words = pd.DataFrame(values, dtype=object)
    numbers = words.apply(pd.to_numeric, errors="coerce")
    if (wrong := (numbers.isna() & words.notna()).to_numpy()).any():
        row, column = np.argwhere(wrong)[0]
        finding = f"finding {findings[column]!r}" if column < len(findings) else f"column {column}"
        expected = _EXPECTED["labels" if called == "labels" else "scores"]
        raise ValueError(f"{called}: study {row}, {finding} is {values[row, column]!r}; expected {expected}")
    return numbers.to_numpy(dtype=float, na_value=np.nan)


def _thresholds(labels, scores, thresholds) -> tuple[np.ndarray, bool]:
    if isinstance(thresholds, str):
        if thresholds != ON_TEST:
            raise ValueError(f"thresholds={thresholds!r}: expected a number, one for each finding, or {ON_TEST!r}")
        return _roc_corner(labels, scores), True
    limits = np.asarray(thresholds, dtype=float)
    if limits.shape not in ((), (labels.shape[1],)) or not ((limits >= 0) & (limits <= 1)).all():
        raise ValueError(f"thresholds={thresholds!r}: expected one number or {labels.shape[1]}, from 0 to 1")
    return np.broadcast_to(limits, labels.shape[1]), False


def _roc_corner(labels, scores) -> np.ndarray:
    from sklearn.metrics import roc_curve

    found = np.full(labels.shape[1], 0.5)
    for k in range(labels.shape[1]):
        known = ~np.isnan(labels[:, k])
        if len(np.unique(labels[known, k])) == 2:
            false, true, limits = roc_curve(labels[known, k], scores[known, k], drop_intermediate=False)
            best = 1 + int(np.argmin(np.hypot(false, 1 - true)[1:]))  # the first point is "nobody", at infinity
            found[k] = limits[best]
    return found


def _weights(patients, resamples: int, seed: int) -> np.ndarray:
    """How often each study counts: (n, 1 + resamples); the first column is the data as it is."""
    if resamples < 1:
        raise ValueError(f"resamples={resamples}: expected at least 1")
    _, patient = np.unique(patients, return_inverse=True)
    n = patient.max() + 1
    if n < 2:
        raise ValueError("all studies are of one patient; an interval over patients needs at least two")
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    counts = np.concatenate([np.ones((1, n)), counts]).astype(np.float32)
    return np.ascontiguousarray(counts.T)[patient]


def _metrics(labels, scores, limits, weights) -> dict[str, np.ndarray]:
    """Each metric for each resample and finding: (1 + resamples, k); NaN where a class is missing."""
    found = {name: np.full((weights.shape[1], labels.shape[1]), np.nan) for name in METRICS}
    for k in range(labels.shape[1]):
        known = ~np.isnan(labels[:, k])
        label, score = labels[known, k], scores[known, k]
        w = weights if known.all() else weights[known]
        if len(np.unique(label)) < 2:
            continue
        with np.errstate(invalid="ignore", divide="ignore"):
            values = _ranked(label, score, w) | _counted(label, score >= limits[k], w)
            values["calibration_error"] = _calibration(label, score, w)
        for name in METRICS:
            found[name][:, k] = values[name]
    return found


def _ranked(label, score, weights) -> dict[str, np.ndarray]:
    """AUROC and average precision for each column of weights (n, m).

    For each positive study it counts, in all resamples, the negatives below it, before and after its ties, and the
    positives from it on, with its ties.
    """
    order = np.argsort(score)
    negative, positive = order[label[order] == 0], order[label[order] == 1]
    below, w = _cumulated(weights[negative]), weights[positive].astype(float)
    first, last = (np.searchsorted(score[negative], score[positive], side) for side in ("left", "right"))
    sick, healthy = w.sum(0), below[-1]
    right = sum(np.einsum("pm,pm->m", w, below[end]) for end in (first, last)) / 2
    hits = sick - _cumulated(w)[np.searchsorted(score[positive], score[positive], "left")]
    called = hits + healthy - below[first]
    precision = hits / np.maximum(called, 1)  # nobody is called only where the study itself was not drawn
    return {"auroc": right / (sick * healthy), "average_precision": np.einsum("pm,pm->m", w, precision) / sick}


def _cumulated(weights) -> np.ndarray:
    """Sums of the first 0, 1, ... rows: (n + 1, m)."""
    sums = np.zeros((len(weights) + 1, weights.shape[1]))
    np.cumsum(weights, axis=0, out=sums[1:])
    return sums


def _counted(label, said, weights) -> dict[str, np.ndarray]:
    """The metrics of yes and no, for each column of weights (n, m); F1 of a class nobody has or gets is 0."""
    parts = np.stack([said & (label == 1), said, label == 1, np.ones_like(said)])
    hit, all_said, sick, everyone = parts.astype(np.float32) @ weights
    healthy = everyone - sick
    rejected = healthy - (all_said - hit)
    f1 = np.where(all_said + sick > 0, 2 * hit / (all_said + sick), 0.0)
    negative = everyone - all_said + healthy
    negative_f1 = np.where(negative > 0, 2 * rejected / negative, 0.0)
    sensitivity, specificity = hit / sick, rejected / healthy
    return {
        "accuracy": (hit + rejected) / everyone,
        "balanced_accuracy": (sensitivity + specificity) / 2,
        "f1": f1,
        "weighted_f1": (sick * f1 + healthy * negative_f1) / everyone,
        "sensitivity": sensitivity,
        "specificity": specificity,
    }


def _calibration(label, score, weights) -> np.ndarray:
    """Calibration error for each column of weights (n, m); a score on an edge belongs to the bin below it."""
    bins = np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], score)  # as scikit-learn's calibration_curve does
    excess = np.where(bins == np.arange(BINS)[:, None], score - label, 0)  # (bins, n)
    return np.abs(excess @ weights).sum(0) / weights.sum(0)


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the findings that have a value; (m, k) -> (m,)."""
    known = ~np.isnan(values)
    total = np.where(known, values, 0).sum(1)
    return np.where(known.any(1), total / np.maximum(known.sum(1), 1), np.nan)


def _drawn(name: str, values: np.ndarray) -> np.ndarray:
    """Values (1 + resamples, k) and their mean over findings; draws of the calibration error are mirrored."""
    drawn = np.concatenate([values, _mean(values)[:, None]], axis=1)
    if name == "calibration_error":
        drawn[1:] = 2 * drawn[0] - drawn[1:]
    return drawn


def _table(values, labels, limits, findings, optimistic: bool) -> "pd.DataFrame":
    import pandas as pd

    columns = {}
    for name in METRICS:
        drawn = _drawn(name, values[name])
        if limits is not None:  # of a model, not a difference
            drawn = np.maximum(drawn, 0)
        empty = np.isnan(drawn).all(0)
        ends = np.full((2, drawn.shape[1]), np.nan)
        ends[:, ~empty] = np.nanpercentile(drawn[1:, ~empty], LEVEL, axis=0)
        columns |= {name: drawn[0], f"{name}_low": ends[0], f"{name}_high": ends[1]}
    if limits is not None:
        columns["threshold"] = [*limits, np.nan]
    columns["positives"] = [*np.nansum(labels, axis=0).astype(int), int(np.nansum(labels))]
    columns["studies"] = [*(~np.isnan(labels)).sum(0), len(labels)]
    table = pd.DataFrame(columns, index=pd.Index([*findings, "mean"], name="finding"))
    gaps = [name for name in findings if np.isnan(table.loc[name, "auroc"])]
    table.attrs["gaps"] = {name: "one class only, so no AUROC; left out of the means" for name in gaps}
    if optimistic:
        table.attrs["optimistic"] = OPTIMISTIC
        table["optimistic"] = True
        table.columns.name = OPTIMISTIC  # shown with any choice of columns or rows, and in files
        table.index.name = f"finding ({OPTIMISTIC})"
    return table
