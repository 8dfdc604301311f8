"""A bootstrap over patients: every metric on the data as it is and on all resamples at once.

A resample is a number for each study: how often its patient was drawn. Two scans of one patient are not two
independent facts, so they are drawn together. Metrics are sums over these numbers; studies are sorted once for all
resamples. A test holds them equal to scikit-learn on repeated rows. `medctkit.metrics.scores` says what each metric is.
Whoever needs an interval over patients of anything else takes `patient_weights`, `weighted_means`, `with_interval`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

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
    "brier",
)
BINS = 10  # of the calibration error
LEVEL = (2.5, 97.5)  # percentiles of a 95 % interval
RESAMPLES = 10_000  # the least p-value is 2 in so many
AT_A_TIME = 1000  # resamples, so that many of them take no more memory


def patient_weights(patients: ArrayLike, resamples: int, seed: int) -> np.ndarray:
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


def metric_draws(
    labels: np.ndarray, scores: np.ndarray, limits: Sequence[float] | np.ndarray, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Each metric for each resample and finding: (1 + resamples, k); NaN where a class is missing."""
    found = {name: np.full((weights.shape[1], labels.shape[1]), np.nan) for name in METRICS}
    for some, k, label, score, w in _parts(labels, scores, weights):
        with np.errstate(invalid="ignore", divide="ignore"):
            values = _ranked(label, score, w) | _calibrated(label, score, w) | _counted(label, score >= limits[k], w)
        for name in METRICS:
            found[name][some, k] = values[name]
    return found


def auroc_draws(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AUROC alone, for each resample and finding, as `metric_draws`: (1 + resamples, k)."""
    found = np.full((weights.shape[1], labels.shape[1]), np.nan)
    for some, k, label, score, w in _parts(labels, scores, weights):
        with np.errstate(invalid="ignore"):
            found[some, k] = _ranked(label, score, w)["auroc"]
    return found


def with_both_classes(labels: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Columns of labels (n, k) that hold both classes, each with which of its labels are known (n,)."""
    for k, column in enumerate(labels.T):
        known = ~np.isnan(column)
        if len(np.unique(column[known])) == 2:
            yield k, known


def _parts(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> Iterator[tuple]:
    """Some resamples of a finding with both classes: which, its column, its known labels and scores, the weights."""
    for k, known in with_both_classes(labels):
        for at in range(0, weights.shape[1], AT_A_TIME):
            some = slice(at, at + AT_A_TIME)
            yield some, k, labels[known, k], scores[known, k], weights[known, some]


def _ranked(label: np.ndarray, score: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
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


def _cumulated(weights: np.ndarray) -> np.ndarray:
    """Sums of the first 0, 1, ... rows: (n + 1, m)."""
    sums = np.zeros((len(weights) + 1, weights.shape[1]))
    np.cumsum(weights, axis=0, out=sums[1:])
    return sums


def _counted(label: np.ndarray, said: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
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


def _calibrated(label: np.ndarray, score: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Calibration error and Brier score for each column of weights (n, m); a score on an edge is of the bin below."""
    bins = np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], score)  # as scikit-learn's calibration_curve does
    excess = np.where(bins == np.arange(BINS)[:, None], score - label, 0)  # (bins, n)
    parts = {"calibration_error": np.abs(excess @ weights).sum(0), "brier": (score - label) ** 2 @ weights}
    return {name: sums / weights.sum(0) for name, sums in parts.items()}


def weighted_means(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Means of the columns of values (n, k), NaN left out, for each column of weights (n, m), and last their mean.

    Returns:
        (m, k + 1); NaN where nothing was drawn that has a value.
    """
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        means = weights.T @ np.where(known, values, 0) / (weights.T @ known)
    return np.concatenate([means, mean_of_findings(means)[:, None]], axis=1)


def interval(draws: np.ndarray) -> np.ndarray:
    """Ends (2, ...) of the 95 % intervals of draws (1 + resamples, ...); the first is the data as it is.

    A resample without a value does not count; where none has one, the ends are NaN.
    """
    drawn = draws[1:]
    some = ~np.isnan(drawn).all(0)
    ends = np.full((2, *drawn.shape[1:]), np.nan)
    ends[:, some] = np.nanpercentile(drawn[:, some], LEVEL, axis=0)
    return ends


def with_interval(name: str, draws: np.ndarray, mirrored: bool = False) -> dict[str, Any]:
    """By `name`, name_low and name_high: a value and the ends of its 95 % interval, of draws (1 + resamples, ...).

    `mirrored` at the value, as draws of calibration errors are.
    """
    low, high = interval(draws)
    if mirrored:
        low, high = 2 * draws[0] - high, 2 * draws[0] - low
    return {name: draws[0], f"{name}_low": low, f"{name}_high": high}


def error_bars(table: Any, name: str = "auroc") -> np.ndarray:
    """Lengths (2, n) of both ends of the intervals of n rows; percentiles of few patients may leave the value out."""
    value, low, high = (getattr(table, name + end) for end in ("", "_low", "_high"))
    return np.maximum([value - low, high - value], 0).reshape(2, -1)


def mean_of_findings(values: np.ndarray) -> np.ndarray:
    """Mean over the findings that have a value; (m, k) -> (m,)."""
    known = ~np.isnan(values)
    return np.where(known.any(1), np.nansum(values, axis=1) / np.maximum(known.sum(1), 1), np.nan)


def holm(p: ArrayLike) -> np.ndarray:
    """P-values corrected for being many tests (Holm, Scand. J. Statist. 6, 1979); a NaN is no test and stays NaN."""
    tests = np.asarray(p, dtype=float)
    order = np.argsort(tests)[: (~np.isnan(tests)).sum()]  # NaNs are sorted last
    corrected = np.full(len(tests), np.nan)
    left = np.arange(len(order), 0, -1)  # tests not yet rejected
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(tests[order] * left))
    return corrected
