"""How good the scores are, and how sure we can be: AUROC, accuracy, F1, with a bootstrap over patients.

Point estimates are scikit-learn's. Intervals resample patients with all their studies, because two scans of
one patient are not two independent facts; all resamples are scored at once from counts (`_auroc`,
`_counts`), which a test holds equal to scikit-learn on repeated rows.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from medctkit.findings import FINDINGS

if TYPE_CHECKING:
    import pandas as pd

METRICS = ("auroc", "accuracy", "f1")
ON_TEST = "roc-corner-on-test"
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
        labels: (n, k) of 0 and 1; NaN where unknown.
        scores: (n, k) probabilities in [0, 1].
        patients: (n,) names; studies of one patient are drawn together.
        thresholds: at which a score counts as positive: one number, one for each finding (from
            `thresholds_from_validation`), or "roc-corner-on-test", which is how the public CT-CLIP code does it.
            That chooses on the very labels it is measured on: optimistic, and marked so in the result.
        findings: k names.
        resamples: bootstrap resamples of patients.
        seed: of the bootstrap.

    Returns:
        A row for each finding and "mean", indexed by name: auroc, accuracy, f1 (positive class), each with _low
        and _high; threshold, positives, studies. The mean f1 is the macro-F1 over findings. A finding with one
        class only has no AUROC: its row is empty, it is left out of the means, and `.attrs["gaps"]` names it.

    Raises:
        ValueError: shapes that do not fit, labels other than 0, 1 and NaN, scores outside [0, 1]; says where.
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
    out. `*_p` is a two-sided bootstrap p-value for no difference, at least 2 / (resamples + 1).

    Args and errors are those of `evaluate`, with scores and thresholds for each model.

    Returns:
        A row for each finding and "mean": auroc, accuracy, f1, each with _low, _high and _p.
    """
    labels, scores_a, patients = _check(labels, scores_a, patients, findings, "scores_a")
    _, scores_b, _ = _check(labels, scores_b, patients, findings, "scores_b")
    weights = _weights(patients, resamples, seed)
    limits_a, optimistic_a = _thresholds(labels, scores_a, thresholds_a)
    limits_b, optimistic_b = _thresholds(labels, scores_b, thresholds_b)
    a, b = _metrics(labels, scores_a, limits_a, weights), _metrics(labels, scores_b, limits_b, weights)
    difference = {name: b[name] - a[name] for name in METRICS}
    table = _table(difference, labels, None, findings, optimistic_a or optimistic_b)
    for name in METRICS:
        drawn = np.concatenate([difference[name][1:], _mean(difference[name][1:])[:, None]], axis=1)
        tail = np.minimum((drawn <= 0).sum(0), (drawn >= 0).sum(0))
        used = (~np.isnan(drawn)).sum(0)  # a rare finding may lack a class in some resamples
        p = np.minimum(1.0, 2 * (tail + 1) / (used + 1))
        table[f"{name}_p"] = np.where(np.isnan(table[name]), np.nan, p)
    return table


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
        {base, adapted, difference} -> {auroc, accuracy, macro_f1} -> {value, low, high}.
    """
    names = {"auroc": "auroc", "accuracy": "accuracy", "macro_f1": "f1"}
    tables = {"base": base, "adapted": adapted, "difference": difference}
    return {
        key: {
            shown: {end: float(table.loc["mean", name + suffix]) for end, suffix in _ENDS.items()}
            for shown, name in names.items()
        }
        for key, table in tables.items()
    }


_ENDS = {"value": "", "low": "_low", "high": "_high"}


def _check(labels, scores, patients, findings, called="scores"):
    """Arrays that fit together, or an error that says what does not."""
    import pandas as pd

    labels, scores, patients = np.asarray(labels, float), np.asarray(scores, float), np.asarray(patients)
    if labels.ndim != 2 or labels.shape[1] != len(findings) or not len(labels):
        raise ValueError(f"labels have shape {labels.shape}, expected (n, {len(findings)}), n at least 1")
    if scores.shape != labels.shape:
        raise ValueError(f"{called} have shape {scores.shape}, labels {labels.shape}: they must be the same")
    if patients.shape != (len(labels),):
        raise ValueError(f"patients have shape {patients.shape}, expected ({len(labels)},): one name for each study")
    if pd.isna(patients).any():
        raise ValueError(f"patients: study {int(pd.isna(patients).argmax())} has none; every study needs its patient")
    for name, values, fine, expected in (
        ("labels", labels, np.isin(labels, (0, 1)) | np.isnan(labels), "0, 1 or NaN (unknown)"),
        (called, scores, (scores >= 0) & (scores <= 1), "probabilities from 0 to 1"),
    ):
        if not fine.all():
            row, column = np.argwhere(~fine)[0]
            raise ValueError(
                f"{name}: study {row}, finding {findings[column]!r} is {values[row, column]}; expected {expected}"
            )
    return labels, scores, patients


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
        found["auroc"][:, k] = _auroc(label, score, w)
        said = score >= limits[k]
        parts = np.stack([said & (label == 1), said, label == 1, np.ones_like(said)])
        hit, all_said, sick, everyone = parts.astype(np.float32) @ w
        with np.errstate(invalid="ignore", divide="ignore"):
            found["accuracy"][:, k] = (everyone - sick - all_said + 2 * hit) / everyone
            f1 = 2 * hit / (all_said + sick)
        found["f1"][:, k] = np.where(all_said + sick > 0, f1, 0.0)
    return found


def _auroc(label, score, weights) -> np.ndarray:
    """AUROC for each column of weights (n, m): the share of pairs in the right order, ties half.

    For each positive study it counts the negatives below it, before and after its ties, in all resamples.
    """
    order = np.argsort(score)
    negative, positive = order[label[order] == 0], order[label[order] == 1]
    below = np.zeros((len(negative) + 1, weights.shape[1]))
    np.cumsum(weights[negative], axis=0, out=below[1:])
    first, last = (np.searchsorted(score[negative], score[positive], side) for side in ("left", "right"))
    sick, w = weights[positive].sum(0, dtype=float), weights[positive].astype(float)
    right = sum(np.einsum("pm,pm->m", w, below[end]) for end in (first, last)) / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        return right / (sick * below[-1])


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the findings that have a value; (m, k) -> (m,)."""
    known = ~np.isnan(values)
    total = np.where(known, values, 0).sum(1)
    return np.where(known.any(1), total / np.maximum(known.sum(1), 1), np.nan)


def _table(values, labels, limits, findings, optimistic: bool) -> "pd.DataFrame":
    import pandas as pd

    columns = {}
    for name in METRICS:
        drawn = np.concatenate([values[name], _mean(values[name])[:, None]], axis=1)  # (1 + resamples, k + 1)
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
        table.attrs["optimistic"] = "thresholds were chosen on the labels they are measured on"
        table["optimistic"] = True
    return table
