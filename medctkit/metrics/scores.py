"""How good the scores are, and how sure we can be: ten metrics, with a bootstrap over patients.

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
- `calibration_error`: expected calibration error of the positive class (Naeini et al., AAAI 2015) in ten bins of equal
  width: mean distance of the mean score from the share of positives, bins weighted by their studies. Lower is better.
- `brier`: mean squared distance of the score from the label (Brier, Mon. Weather Rev. 78, 1950): calibration and
  separation in one number, that of always saying the share p of positives being p (1 - p). Lower is better.

Point estimates are scikit-learn's. Intervals come from resamples of patients (`bootstrap`): percentiles, but
for the calibration error. That is too large in small samples, and larger again in resamples of them; its draws are
mirrored at the estimate, which takes the excess off (basic bootstrap interval; Davison and Hinkley, Bootstrap Methods
and their Application, 1997, chapter 5). So its interval can lie below its estimate. It stays the least certain: in a
simulation with a true error of 0.15 it held the truth for 81 % of samples of 120 studies and for 89 % of 400, and of a
model that is calibrated nearly perfectly, even the interval is mostly too high.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from sklearn.metrics import roc_auc_score, roc_curve

from medctkit.findings import FINDINGS
from medctkit.metrics.bootstrap import (
    METRICS,
    RESAMPLES,
    auroc_draws,
    holm,
    mean_of_findings,
    metric_draws,
    patient_weights,
    with_both_classes,
    with_interval,
)

ON_TEST = "roc-corner-on-test"
OPTIMISTIC = "optimistic: thresholds were chosen on the labels they are measured on"
# Of metrics.json, with the words for them; at home no threshold is chosen.
ROWS = {"auroc": "mean AUROC", "accuracy": "accuracy", "macro_f1": "macro-F1"}
HOME_ROWS = {"auroc": "mean AUROC", "ece": "calibration error", "brier": "Brier score"}
COLUMNS = ("base", "adapted", "difference")
BLIND = {"auroc": "chance", "accuracy": "always no", "macro_f1": "always yes"}  # what gets so much without a look
COLUMN_OF = {"macro_f1": "f1", "ece": "calibration_error"}  # of the tables, where its name is another


def evaluate(
    labels: ArrayLike,
    scores: ArrayLike,
    patients: ArrayLike,
    thresholds: ArrayLike = 0.5,
    findings: Sequence[str] = FINDINGS,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
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
    weights = patient_weights(patients, resamples, seed)
    return _evaluated(labels, scores, thresholds, weights, findings)[0]


def compare(
    labels: ArrayLike,
    scores_a: ArrayLike,
    scores_b: ArrayLike,
    patients: ArrayLike,
    thresholds_a: ArrayLike = 0.5,
    thresholds_b: ArrayLike = 0.5,
    findings: Sequence[str] = FINDINGS,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """What model b does better than model a on the same studies: paired differences, b minus a.

    Both models are scored on the same resamples of patients, so that what makes a resample easy for both drops
    out. `*_p` is a two-sided bootstrap p-value for no difference, at least 2 / (resamples + 1), which is `*_p_floor`:
    there it is a bound, "<=", as `p_texts` prints it. `*_p_holm` is corrected over the findings.

    Args and errors are those of `evaluate`, with scores and thresholds for each model.

    Returns:
        A row for each finding and "mean": each of `METRICS` with _low, _high, _p, _p_floor and _p_holm, see `holm`. The
        mean is one test and has no _p_holm.
    """
    both, limits = (scores_a, scores_b), (thresholds_a, thresholds_b)
    return evaluate_both(labels, both, patients, limits, findings, resamples, seed)[2]


def evaluate_both(
    labels: ArrayLike,
    scores: tuple[ArrayLike, ArrayLike],
    patients: ArrayLike,
    thresholds: tuple[ArrayLike, ArrayLike] = (0.5, 0.5),
    findings: Sequence[str] = FINDINGS,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Two models' tables and their difference, from resamples scored once.

    Args and errors are those of `compare`; `scores` and `thresholds` are of model a and of model b.

    Returns:
        The table of `evaluate` of model a, that of model b, and that of `compare`.
    """
    _, scores_b, _ = _check(labels, scores[1], patients, findings, "scores_b")
    labels, scores_a, patients = _check(labels, scores[0], patients, findings, "scores_a")
    weights = patient_weights(patients, resamples, seed)
    (table_a, a), (table_b, b) = (
        _evaluated(labels, each, limits, weights, findings)
        for each, limits in zip((scores_a, scores_b), thresholds, strict=True)
    )
    difference = {name: b[name] - a[name] for name in METRICS}
    table = _table(difference, labels, None, findings, any("optimistic" in each for each in (table_a, table_b)))
    for name in METRICS:
        drawn = _drawn(name, difference[name])[1:]
        tail = np.minimum((drawn <= 0).sum(0), (drawn >= 0).sum(0))
        used = (~np.isnan(drawn)).sum(0)  # a rare finding may lack a class in some resamples
        unit = np.where(np.isnan(table[name]), np.nan, 2 / (used + 1))
        p = np.minimum(1.0, unit * (tail + 1))
        table[f"{name}_p"], table[f"{name}_p_floor"], table[f"{name}_p_holm"] = p, unit, [*holm(p[:-1]), np.nan]
    return table_a, table_b, table


def p_texts(difference: pd.DataFrame, metric: str = "auroc") -> pd.DataFrame:
    """The p-values of `compare` for a metric as text, "p" and "p, Holm": "<= 0.0002" where only a bound is known."""
    p, floor, corrected = (difference[f"{metric}_{end}"] for end in ("p", "p_floor", "p_holm"))
    bounds = p <= floor
    carried = corrected <= corrected[bounds].max()  # a bound also reaches those after it in Holm's order

    def text(values: pd.Series, bound: pd.Series) -> list[str]:
        pairs = zip(values, bound, strict=True)
        return ["-" if v != v else f"{'<= ' if at_most and v < 1 else ''}{v:.2g}" for v, at_most in pairs]

    return pd.DataFrame({"p": text(p, bounds), "p, Holm": text(corrected, carried)}, index=difference.index)


def mean_draws(
    labels: ArrayLike,
    scores: ArrayLike,
    patients: ArrayLike,
    findings: Sequence[str] = FINDINGS,
    resamples: int = 1000,
    seed: int = 0,
) -> np.ndarray:
    """The mean AUROC over findings on the data as it is, then on each resample of patients: (1 + resamples,).

    Resample i is the same for all scores of the same studies, so draws can be subtracted and averaged; the intervals of
    `evaluate` are their percentiles. Args and errors are those of `evaluate`; fewer resamples, as draws are kept.
    """
    labels, scores, patients = _check(labels, scores, patients, findings)
    return mean_of_findings(auroc_draws(labels, scores, patient_weights(patients, resamples, seed)))


def mean_auroc(labels: np.ndarray, scores: np.ndarray) -> float:
    """The mean AUROC of `evaluate`, without interval: over findings with both classes in labels (n, k), NaN left out.

    Raises:
        ValueError: no finding has both classes.
    """
    found = [roc_auc_score(labels[known, k], scores[known, k]) for k, known in with_both_classes(labels)]
    if not found:
        raise ValueError("no finding has both positive and negative studies in the validation data")
    return float(np.mean(found))


def thresholds_from_validation(labels: ArrayLike, scores: ArrayLike, findings: Sequence[str] = FINDINGS) -> np.ndarray:
    """For each finding the threshold whose ROC point lies nearest the corner (0, 1), from validation studies.

    The criterion is the public CT-CLIP code's, which applies it to the test labels; here it never sees them.
    A finding with one class in the validation data keeps 0.5.

    Returns:
        (k,) thresholds.
    """
    labels, scores, _ = _check(labels, scores, np.arange(np.shape(labels)[0]), findings)
    return _roc_corner(labels, scores)


def summary(
    base: pd.DataFrame,
    adapted: pd.DataFrame,
    difference: pd.DataFrame,
    rows: Iterable[str] = ROWS,
    finding: str = "mean",
) -> dict:
    """The means (or a finding) of two evaluations and their comparison, as `make demo` writes them to metrics.json.

    Returns:
        {base, adapted, difference} -> {auroc, accuracy, macro_f1} or other `rows` -> {value, low, high};
        "without_a_look" -> those of `BLIND` among the rows; "optimistic" and why, if one of the tables is.
    """
    tables = {"base": base, "adapted": adapted, "difference": difference}
    ends = {"value": "", "low": "_low", "high": "_high"}
    found: dict[str, Any] = {
        key: {
            row: {end: float(table.loc[finding, COLUMN_OF.get(row, row) + suffix]) for end, suffix in ends.items()}
            for row in rows
        }
        for key, table in tables.items()
    }
    if finding == "mean":
        found["without_a_look"] = {row: each for row, each in without_a_look(base).items() if row in found["base"]}
    return found | ({"optimistic": OPTIMISTIC} if any("optimistic" in table for table in tables.values()) else {})


def without_a_look(table: pd.DataFrame) -> dict[str, float]:
    """What the mean over findings of a table of `evaluate` would be, had nobody looked at a scan; see `BLIND`."""
    known = table.drop(index="mean").dropna(subset="auroc")
    share = known["positives"] / known["studies"]
    return {"auroc": 0.5, "accuracy": float((1 - share).mean()), "macro_f1": float((2 * share / (1 + share)).mean())}


def _check(
    labels: ArrayLike, scores: ArrayLike, patients: ArrayLike, findings: Sequence[str], called: str = "scores"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Arrays that fit together, or an error that says what does not."""
    _check_order({"labels": labels, called: scores, "patients": patients}, findings)
    labels, scores, patients = np.asarray(labels), np.asarray(scores), np.asarray(patients)
    if labels.ndim != 2 or labels.shape[1] != len(findings) or not len(labels):
        raise ValueError(f"labels have shape {labels.shape}, expected (n, {len(findings)}), n at least 1")
    if scores.shape != labels.shape:
        raise ValueError(f"{called} have shape {scores.shape}, labels {labels.shape}: they must be the same")
    if patients.shape != (len(labels),):
        raise ValueError(f"patients have shape {patients.shape}, expected ({len(labels)},): one name for each study")
    if pd.isna(patients).any():
        raise ValueError(f"patients: study {int(pd.isna(patients).argmax())} has none; every study needs its patient")
    return _numbers("labels", labels, findings), _numbers(called, scores, findings), patients


def _check_order(given: dict[str, Any], findings: Sequence[str]) -> None:
    """What pandas knows of the order of studies and findings must agree: as arrays, tables lose their names."""
    tables = {name: value for name, value in given.items() if hasattr(value, "iloc")}
    for name, table in tables.items():
        columns = list(getattr(table, "columns", findings))
        if columns != list(findings):
            raise ValueError(f"{name} have columns {columns}, expected {list(findings)}, in that order")
    first = next(iter(tables), "")
    for name in tables:
        one, two = tables[first].index, tables[name].index
        if len(one) == len(two) and (different := np.asarray(one != two)).any():
            row = int(different.argmax())
            where = f"study {row} is {one[row]!r} in the index of {first}, {two[row]!r} in that of {name}"
            raise ValueError(
                f"{where}: bring both into one order, or give arrays (.to_numpy()) if only the names differ"
            )


def _numbers(called: str, values: np.ndarray, findings: Sequence[str]) -> np.ndarray:
    """Labels of 0, 1 and NaN, or scores from 0 to 1, as floats (n, k)."""
    numbers = values
    if values.dtype.kind not in "biuf":  # nullable integers, words
        numbers = pd.DataFrame(values).apply(pd.to_numeric, errors="coerce").to_numpy(dtype=float, na_value=np.nan)
    if called == "labels":
        fine, expected = np.isin(numbers, (0, 1)) | pd.isna(values), "0, 1 or NaN (unknown)"
    else:
        fine, expected = (numbers >= 0) & (numbers <= 1), "probabilities from 0 to 1"
    if not fine.all():
        row, column = np.argwhere(~fine)[0]
        got = values.astype(object)[row, column]
        raise ValueError(f"{called}: study {row}, finding {findings[column]!r} is {got!r}; expected {expected}")
    return numbers.astype(float)


def _thresholds(labels: np.ndarray, scores: np.ndarray, thresholds: ArrayLike) -> tuple[np.ndarray, bool]:
    if isinstance(thresholds, str):
        if thresholds != ON_TEST:
            raise ValueError(f"thresholds={thresholds!r}: expected a number, one for each finding, or {ON_TEST!r}")
        return _roc_corner(labels, scores), True
    limits = np.asarray(thresholds, dtype=float)
    if limits.shape not in ((), (labels.shape[1],)) or not ((limits >= 0) & (limits <= 1)).all():
        raise ValueError(f"thresholds={thresholds!r}: expected one number or {labels.shape[1]}, from 0 to 1")
    return np.broadcast_to(limits, labels.shape[1]), False


def _roc_corner(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    found = np.full(labels.shape[1], 0.5)
    for k, known in with_both_classes(labels):
        false, true, limits = roc_curve(labels[known, k], scores[known, k], drop_intermediate=False)
        best = 1 + int(np.argmin(np.hypot(false, 1 - true)[1:]))  # the first point is "nobody", at infinity
        found[k] = limits[best]
    return found


def _evaluated(
    labels: np.ndarray, scores: np.ndarray, thresholds: ArrayLike, weights: np.ndarray, findings: Sequence[str]
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """The table of `evaluate`, and the draws that it is made of."""
    limits, optimistic = _thresholds(labels, scores, thresholds)
    draws = metric_draws(labels, scores, limits, weights)
    return _table(draws, labels, limits, findings, optimistic), draws


def _drawn(name: str, values: np.ndarray) -> np.ndarray:
    """Values (1 + resamples, k) and their mean over findings; draws of the calibration error are mirrored."""
    drawn = np.concatenate([values, mean_of_findings(values)[:, None]], axis=1)
    if name == "calibration_error":
        drawn[1:] = 2 * drawn[0] - drawn[1:]
    return drawn


def _table(
    values: dict[str, np.ndarray],
    labels: np.ndarray,
    limits: np.ndarray | None,
    findings: Sequence[str],
    flattered: bool,
) -> pd.DataFrame:
    columns: dict[str, Any] = {}
    for name in METRICS:
        drawn = _drawn(name, values[name])
        if limits is not None:  # of a model, not a difference
            drawn = np.maximum(drawn, 0)
        columns |= with_interval(name, drawn)
    if limits is not None:
        columns["threshold"] = [*limits, np.nan]
    columns["positives"] = [*np.nansum(labels, axis=0).astype(int), int(np.nansum(labels))]
    columns["studies"] = [*(~np.isnan(labels)).sum(0), len(labels)]
    table = pd.DataFrame(columns, index=pd.Index([*findings, "mean"], name="finding"))
    gaps = [name for name in findings if np.isnan(table.loc[name, "auroc"])]
    why = {name: "one class only" if table.loc[name, "studies"] else "no known label" for name in gaps}
    table.attrs["gaps"] = {name: f"{reason}, so no AUROC; left out of the means" for name, reason in why.items()}
    if flattered:
        table.attrs["optimistic"] = OPTIMISTIC
        table["optimistic"] = True
        table.columns.name = OPTIMISTIC  # shown with any choice of columns or rows, and in files
        table.index.name = f"finding ({OPTIMISTIC})"
    return table


def result_table(metrics: dict) -> str:
    """What is in metrics.json as text: one row per metric, 95 % intervals in brackets; below it, what it is at home."""
    parts, lines = [(f"{'':18}", metrics, ROWS)], []
    if home := metrics.get("home"):
        title = f"at home: {home['studies']} test studies of hospital {home['hospital']}\n"
        parts.append((f"{title}{'':18}", home, HOME_ROWS))
    for title, numbers, rows in parts:
        blind = numbers.get("without_a_look", {})
        titles = [*COLUMNS, *(["without a look"] if blind else [])]
        lines.append(title + "".join(f"{column:>26}" for column in titles))
        for row, name in rows.items():
            line = f"{name:18}"
            for column in COLUMNS:
                sign = "+" if column == "difference" else ""
                value, low, high = (format(numbers[column][row][key], f"{sign}.3f") for key in ("value", "low", "high"))
                line += f"{f'{value} [{low}, {high}]':>26}"
            lines.append(line + (f"{f'{blind[row]:.3f}, {BLIND[row]}':>26}" if row in blind else ""))
    return "\n".join(lines)
