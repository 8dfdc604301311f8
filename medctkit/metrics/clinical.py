"""What a clinician asks beyond AUROC: calibration made anew, net benefit, predictive values, subgroups, a second test.

Labels are (n, k) of 0, 1 and NaN (unknown), scores (n, k) in [0, 1], `weights` (n, m) those of `patient_weights`:
column 0 is the data as it is, the others resamples of patients. Values come as draws (m, ...).

Recalibration is scikit-learn's. The rest is a line or two each, over resamples of patients, which no library offers:
`dcurves` has net benefit of single samples, SciPy and statsmodels have no DeLong test.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.special import logit
from scipy.stats import norm, rankdata
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from medctkit.findings import FINDINGS
from medctkit.metrics.bootstrap import auroc_draws, mean_of_findings, patient_weights, with_interval

RECALIBRATIONS = ("none", "Platt", "isotonic")
FOLDS = 5  # of the validation patients, to choose a recalibration
SMALL = 50  # patients of a subgroup, below which its row carries a warning


def recalibrated(method: str, labels: np.ndarray, scores: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Scores `new` (m, k), each finding by a curve fitted on its labels and scores (n, k): validation studies.

    "Platt" fits a logistic curve to the log-odds (Platt 1999), "isotonic" a rising staircase (Zadrozny & Elkan 2002),
    "none" nothing. A finding with less than two studies of a class there keeps its scores.

    Raises:
        ValueError: another method.
    """
    if method not in RECALIBRATIONS:
        raise ValueError(f"method={method!r}: expected one of {', '.join(RECALIBRATIONS)}")
    found, (old, fresh) = new.copy(), (logit(np.clip(x, 1e-6, 1 - 1e-6)) for x in (scores, new))
    for k in range(labels.shape[1]):
        known = ~np.isnan(labels[:, k])
        label = labels[known, k]
        if method == "none" or min(np.sum(label == c) for c in (0, 1)) < 2:
            continue
        if method == "Platt":  # next to no penalty: it only keeps the slope finite where the classes do not overlap
            line = make_pipeline(StandardScaler(), LogisticRegression(C=1e3)).fit(old[known, k, None], label)
            found[:, k] = line.predict_proba(fresh[:, k, None])[:, 1]
        else:
            stairs = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(old[known, k], label)
            found[:, k] = np.clip(stairs.predict(fresh[:, k]), 0, 1)  # in float32 it may go a digit beyond
    return found


def choose_recalibration(labels: np.ndarray, scores: np.ndarray, patients: ArrayLike) -> dict[str, float]:
    """Mean Brier score of each of `RECALIBRATIONS` on validation studies that its curve has not seen; least is best.

    The studies are cut into five parts by patients (n,); of two patients to four, into as many. With one patient only
    "none" has a score, the others NaN.
    """
    parts = min(FOLDS, len(np.unique(patients)))
    if parts < 2:
        return dict.fromkeys(RECALIBRATIONS, np.nan) | {"none": float(np.nanmean((scores - labels) ** 2))}
    folds = list(GroupKFold(parts).split(scores, groups=patients))
    found = {}
    for method in RECALIBRATIONS:
        unseen = np.empty_like(scores)
        for seen, left_out in folds:
            unseen[left_out] = recalibrated(method, labels[seen], scores[seen], scores[left_out])
        found[method] = float(np.nanmean((unseen - labels) ** 2))
    return found


def net_benefit(labels: np.ndarray, scores: np.ndarray, thresholds: Sequence[float], weights: np.ndarray) -> np.ndarray:
    r"""Net benefit (m, thresholds, k) of acting from a probability of t on: $TP/n - FP/n \cdot t / (1 - t)$.

    The threshold says what a false alarm costs: at t = 0.2, a fourth of what a hit is worth. Acting on nobody has net
    benefit 0, acting on everybody that of scores of 1. Source: decision curves, Vickers & Elkin, Med Decis Making 26
    (2006). The scores should be calibrated.
    """
    odds = np.array(thresholds) / (1 - np.array(thresholds))
    found = np.full((weights.shape[1], len(thresholds), labels.shape[1]), np.nan)
    for k in range(labels.shape[1]):
        known = ~np.isnan(labels[:, k])
        sick, w = labels[known, k] == 1, weights[known].astype(float)
        said = scores[known, k] >= np.array(thresholds)[:, None]
        with np.errstate(invalid="ignore"):
            found[:, :, k] = (((said & sick) @ w - odds[:, None] * ((said & ~sick) @ w)) / w.sum(0)).T
    return found


def predictive_values(sensitivity: ArrayLike, specificity: ArrayLike, prevalence: ArrayLike) -> tuple:
    """Predictive values, positive and negative, by Bayes' rule, where a share `prevalence` of patients is sick.

    The arrays have shapes that fit together; NaN where nobody would be called positive, or negative.
    """
    sens, spec, share = (np.asarray(x, dtype=float) for x in (sensitivity, specificity, prevalence))
    hit, miss, rejected, alarm = sens * share, (1 - sens) * share, spec * (1 - share), (1 - spec) * (1 - share)
    with np.errstate(invalid="ignore"):
        return hit / (hit + alarm), rejected / (rejected + miss)


def crg_score(labels: np.ndarray, said: np.ndarray, weights: np.ndarray) -> np.ndarray:
    r"""CRG score (m,) of yes and no (n, k), all findings together: 1 is perfect, all yes and all no get 1/3.

    Of X answers A are positive; with $r = (X - A) / 2A$ and $s = r\,TP - r\,FN - FP$ it is $rA / (2rA - s)$. Source:
    Hamamci et al. 2025 (arXiv 2505.17167), a score of the VLM3D challenge for findings named in generated reports; here
    the answers are scores at their thresholds. NaN where no study is positive, or all are.
    """
    known, sick = ~np.isnan(labels), labels == 1
    counts = (known, sick, said & sick, said & known & ~sick)
    every, positive, hit, alarm = (np.sum(part, axis=1) @ weights.astype(float) for part in counts)
    top = (every - positive) / 2  # r A
    with np.errstate(invalid="ignore", divide="ignore"):
        return top / (2 * top - (top * (2 * hit / positive - 1) - alarm))


def delong(
    labels: np.ndarray,
    scores_a: np.ndarray,
    scores_b: np.ndarray,
    patients: ArrayLike,
    findings: Sequence[str] = FINDINGS,
) -> pd.DataFrame:
    """The difference in AUROC, b minus a, of each of `findings` and their mean, by DeLong's test: no bootstrap.

    Each study's share in the difference is summed over its patient, as Obuchowski (Biometrics 53, 1997) does for
    clusters; where each patient has one study, it is the test of DeLong et al. (Biometrics 44, 1988).

    Returns:
        Columns auroc, auroc_low, auroc_high (95 %) and auroc_p of `findings` and "mean"; NaN below two patients of a
        class, whose studies cannot say how much patients differ.
    """
    _, patient = np.unique(patients, return_inverse=True)
    difference = np.full(labels.shape[1], np.nan)
    shares = np.zeros((patient.max() + 1, labels.shape[1]))
    for k in range(labels.shape[1]):
        groups = [np.flatnonzero(labels[:, k] == c) for c in (0, 1)]
        people = [len(np.unique(patient[group])) for group in groups]
        if min(people) < 2:
            continue
        order = np.concatenate(groups)
        for sign, scores in ((-1, scores_a[:, k]), (1, scores_b[:, k])):
            ranks = np.split(rankdata(scores[order]), [len(groups[0])])
            for group, rank, right, n in zip(groups, ranks, (-1, 1), people, strict=True):
                other = len(order) - len(group)
                placed = right * (rank - rankdata(scores[group])) / other  # pairs in the right order, of each study
                placed -= placed.mean()
                weight = sign * placed / len(group) * np.sqrt(n / (n - 1))
                shares[:, k] += np.bincount(patient[group], weight, len(shares))
            auroc = (ranks[1].mean() - (len(groups[1]) + 1) / 2) / len(groups[0])
            difference[k] = (0 if sign < 0 else difference[k]) + sign * auroc
    known = ~np.isnan(difference)
    values = np.append(difference, difference[known].mean() if known.any() else np.nan)
    errors = np.sqrt((np.column_stack([shares, shares[:, known].sum(1) / max(known.sum(), 1)]) ** 2).sum(0))
    with np.errstate(invalid="ignore", divide="ignore"):
        p = np.where(values == 0, 1.0, 2 * norm.sf(np.abs(values) / errors))
    ends = {f"auroc_{end}": values + sign * norm.ppf(0.975) * errors for end, sign in (("low", -1), ("high", 1))}
    return pd.DataFrame({"auroc": values} | ends | {"auroc_p": p}, index=[*findings, "mean"])


def subgroup_table(
    labels: np.ndarray,
    scores: Mapping[str, np.ndarray],
    patients: ArrayLike,
    groups: pd.DataFrame,
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Mean AUROC of two models in each subgroup, their difference, and the second's against the rest of the studies.

    Args:
        labels: (n, k).
        scores: of two models by name, each (n, k).
        patients: (n,) names.
        groups: (n, characteristics) of text; "" where unknown: in no subgroup, and not in the rest either.
        resamples: of patients.
        seed: of the bootstrap.

    Returns:
        A row for each subgroup: characteristic, subgroup, studies, patients, findings (how many have both classes
        there: the mean is theirs), then each model, "difference" and "against the rest", with _low and _high, and
        "warning": what makes the row weak, or "". Of the rest only findings count that the subgroup has as well.
    """
    weights, names, rows = patient_weights(patients, resamples, seed), np.asarray(patients), []
    for characteristic in groups:
        values = groups[characteristic].to_numpy()
        for value in sorted(set(values) - {""}):
            inside, rest = values == value, (values != value) & (values != "")
            draws = {m: auroc_draws(labels[inside], s[inside], weights[inside]) for m, s in scores.items()}
            first, second = draws.values()
            draws["difference"] = second - first
            others = auroc_draws(labels[rest], list(scores.values())[1][rest], weights[rest])
            draws["against the rest"] = second - others
            people, scored = len(np.unique(names[inside])), int((~np.isnan(first[0])).sum())
            missing = labels.shape[1] - scored
            why = [f"only {people} patients"] * (people < SMALL)
            why += [f"{missing} of {labels.shape[1]} findings have one class only"] * (missing > 0)
            row: dict[str, Any] = dict(characteristic=characteristic, subgroup=value, studies=int(inside.sum()))
            row |= dict(patients=people, findings=scored)
            for name, drawn in draws.items():
                row |= with_interval(name, mean_of_findings(drawn))
            rows.append(row | {"warning": "; ".join(why)})
    columns = ["characteristic", "subgroup", "studies", "patients", "findings"]
    columns += [f"{name}{end}" for name in (*scores, "difference", "against the rest") for end in ("", "_low", "_high")]
    return pd.DataFrame(rows, columns=[*columns, "warning"])
