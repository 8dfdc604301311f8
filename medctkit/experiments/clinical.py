"""What a clinician asks of base and adapted model, on the test studies of a hospital; see `metrics.clinical`.

What has to be chosen, the recalibration and the thresholds, is chosen on validation studies.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from medctkit.findings import FINDINGS, PREVALENCE
from medctkit.metrics.bootstrap import interval, mean_of_findings, metric_draws, patient_weights
from medctkit.metrics.clinical import (
    RECALIBRATIONS,
    choose_recalibration,
    crg_score,
    delong,
    net_benefit,
    predictive_values,
    recalibrated,
    subgroup_table,
)
from medctkit.metrics.scores import evaluate
from medctkit.zero_shot.classifier import Embedded

if TYPE_CHECKING:
    import pandas as pd

RESAMPLES = 1000  # at most: intervals need no more, and no p-value hangs on them
MARKED = (0.05, 0.1, 0.2, 0.3, 0.5)  # thresholds of the decision table
GRID = tuple(np.linspace(0.01, 0.6, 60).round(2).tolist())  # and of the curves


@dataclass(frozen=True)
class Clinical:
    """Tables of numbers, one row for each thing; value, low and high are columns, intervals 95 % over patients.

    Attributes:
        subgroups: see `subgroup_table`.
        recalibration: a row for each model and of `RECALIBRATIONS`: mean AUROC, calibration_error and brier on test
            studies, and `validation`, the cross-validated Brier score there; `chosen` has the least.
        predictive: a row for each model and finding: `prevalence`, that of CT-RATE's training scans, and there
            `ppv` and `npv` at the threshold from validation.
        decision: a row for each threshold of `MARKED` and policy: mean net benefit over findings.
        curves: net benefit (thresholds of `GRID`, findings) of acting as a model says, or on everybody.
        crg: a row for base, adapted and difference.
        delong: see `metrics.clinical.delong`, adapted minus base.
    """

    subgroups: "pd.DataFrame"
    recalibration: "pd.DataFrame"
    predictive: "pd.DataFrame"
    decision: "pd.DataFrame"
    curves: dict[str, np.ndarray]
    crg: "pd.DataFrame"
    delong: "pd.DataFrame"

    @property
    def summary(self) -> dict[str, list[dict]]:
        """The tables as plain data, for metrics.json under "clinical"; None where there is no value."""
        tables = {name: table for name, table in vars(self).items() if name != "curves"}
        tables["delong"] = self.delong.rename_axis("finding").reset_index()
        return {name: t.astype(object).where(t.notna(), None).to_dict("records") for name, t in tables.items()}


def clinical_statistics(
    valid: Embedded,
    test: Embedded,
    scores: dict[str, dict[str, np.ndarray]],
    limits: dict[str, np.ndarray],
    groups: "pd.DataFrame",
    resamples: int,
    seed: int,
) -> Clinical:
    """All of it.

    Args:
        valid: of it labels and patients.
        test: of it labels and patients.
        scores: "valid" and "test" -> "base" and "adapted" -> (n, 18).
        limits: thresholds (18,) of both models, from validation.
        groups: see `subgroup_table`, of the test studies.
        resamples: of patients, see `RESAMPLES`.
        seed: of the bootstrap.
    """
    import pandas as pd

    resamples = min(resamples, RESAMPLES)
    labels, weights = test.labels, patient_weights(test.patients, resamples, seed)

    def ends(drawn: np.ndarray, name: str = "value") -> dict[str, float]:
        low, high = interval(drawn[:, None])[:, 0].tolist()
        prefix = "" if name == "value" else f"{name}_"
        return {name: float(drawn[0]), f"{prefix}low": low, f"{prefix}high": high}

    recalibration, predictive = [], []
    mended: dict[str, np.ndarray] = {}
    for model, said in scores["test"].items():
        risks = choose_recalibration(valid.labels, scores["valid"][model], valid.patients)
        best = min(risks, key=risks.__getitem__)
        for method in RECALIBRATIONS:
            new = recalibrated(method, valid.labels, scores["valid"][model], said)
            mean = evaluate(labels, new, test.patients, resamples=resamples, seed=seed).loc["mean"]
            row = {"model": model, "method": method, "validation": risks[method], "chosen": method == best}
            metrics = ("auroc", "calibration_error", "brier")
            recalibration.append(
                row | {f"{m}{end}": float(mean[m + end]) for m in metrics for end in ("", "_low", "_high")}
            )
            mended |= {model: new} if method == best else {}
        draws, shares = metric_draws(labels, said, limits[model], weights), np.array(list(PREVALENCE.values()))
        values = predictive_values(draws["sensitivity"], draws["specificity"], shares)
        for k, finding in enumerate(FINDINGS):
            row = {"model": model, "finding": finding, "prevalence": float(shares[k])}
            predictive.append(row | ends(values[0][:, k], "ppv") | ends(values[1][:, k], "npv"))
    policies = mended | {"everybody": np.ones_like(labels)}
    once = weights[:, :1]
    decision = [
        {"threshold": t, "policy": name} | ends(mean_of_findings(net_benefit(labels, said, [t], weights)[:, 0]))
        for t in MARKED
        for name, said in policies.items()
    ]
    crg = {name: crg_score(labels, said >= limits[name], weights) for name, said in scores["test"].items()}
    crg["difference"] = crg["adapted"] - crg["base"]
    return Clinical(
        subgroups=subgroup_table(labels, scores["test"], test.patients, groups, resamples, seed),
        recalibration=pd.DataFrame(recalibration),
        predictive=pd.DataFrame(predictive),
        decision=pd.DataFrame(decision),
        curves={name: net_benefit(labels, said, GRID, once)[0] for name, said in policies.items()},
        crg=pd.DataFrame([{"model": name} | ends(drawn) for name, drawn in crg.items()]),
        delong=delong(labels, scores["test"]["base"], scores["test"]["adapted"], test.patients),
    )
