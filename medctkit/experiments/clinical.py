"""What a clinician asks of base and adapted model, on the test studies of a hospital; see `metrics.clinical`.

What has to be chosen, the recalibration and the thresholds, is chosen on validation studies.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from medctkit.common.provenance import records
from medctkit.findings import FINDINGS, PREVALENCE
from medctkit.metrics.bootstrap import mean_of_findings, metric_draws, patient_weights, with_interval
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

RESAMPLES = 1000  # at most: intervals need no more, and no p-value hangs on them
MARKED = (0.05, 0.1, 0.2, 0.3, 0.5)  # thresholds of the decision table
GRID = tuple(np.linspace(0.01, 0.6, 60).round(2).tolist())  # and of the curves


@dataclass(frozen=True)
class Clinical:
    """Tables of numbers: a column x has its 95 % interval over patients in x_low and x_high.

    Attributes:
        tables: `subgroups`, see `subgroup_table`; `recalibration`, for each model and of `RECALIBRATIONS` the means
            over findings on test studies, `validation`, the cross-validated Brier score there, which is `chosen` by it;
            `predictive values` at the thresholds from validation and the `prevalence` of the table of findings;
            `net benefit`, mean over findings, of each policy at the thresholds `MARKED`; `CRG score`; `DeLong`, adapted
            minus base, see `delong`.
        curves: net benefit (thresholds of `GRID`, findings) of acting as a model says, or on everybody.
    """

    tables: dict[str, pd.DataFrame]
    curves: dict[str, np.ndarray]

    @property
    def summary(self) -> dict[str, list[dict]]:
        """The tables as plain data, for metrics.json under "clinical"; None where there is no value."""
        return {name: records(table) for name, table in self.tables.items()}


def clinical_statistics(
    valid: Embedded,
    test: Embedded,
    scores: dict[str, dict[str, np.ndarray]],
    limits: dict[str, np.ndarray],
    groups: pd.DataFrame,
    resamples: int,
    seed: int,
) -> Clinical:
    """All of it, from labels and patients of `valid` and `test` studies.

    Args:
        valid: of it labels and patients.
        test: of it labels and patients.
        scores: "valid" and "test" -> "base" and "adapted" -> (n, 18).
        limits: thresholds (18,) of both models, from validation.
        groups: see `subgroup_table`, of the test studies.
        resamples: of patients, see `RESAMPLES`.
        seed: of the bootstrap.
    """
    drawn: dict[str, Any] = {"resamples": min(resamples, RESAMPLES), "seed": seed}
    labels, weights = test.labels, patient_weights(test.patients, **drawn)
    recalibration, crg, policies = [], {}, {"everybody": np.ones_like(labels)}
    predictive: dict[str, dict] = {name: {"finding": name, "prevalence": PREVALENCE[name]} for name in FINDINGS}
    for model, said in scores["test"].items():
        risks = choose_recalibration(valid.labels, scores["valid"][model], valid.patients)
        best = min(risks, key=risks.__getitem__)
        for method in RECALIBRATIONS:
            new = recalibrated(method, valid.labels, scores["valid"][model], said)
            mean = evaluate(labels, new, test.patients, **drawn).loc["mean"]
            row = {"model": model, "method": method, "validation": risks[method], "chosen": method == best}
            columns = [m + end for m in ("auroc", "calibration_error", "brier") for end in ("", "_low", "_high")]
            recalibration.append(row | mean[columns].astype(float).to_dict())
            policies |= {model: new} if method == best else {}
        draws = metric_draws(labels, said, limits[model], weights)
        ppv, npv = predictive_values(draws["sensitivity"], draws["specificity"], [*PREVALENCE.values()])
        for k, row in enumerate(predictive.values()):
            row |= with_interval(f"{model} PPV", ppv[:, k]) | with_interval(f"{model} NPV", npv[:, k])
        crg[model] = crg_score(labels, said >= limits[model], weights)
    crg["difference"] = crg["adapted"] - crg["base"]
    worth: list[dict] = [{"threshold": t, "nobody": 0.0} for t in MARKED]
    for name, said in policies.items():
        benefit = net_benefit(labels, said, MARKED, weights)
        for i, row in enumerate(worth):
            row |= with_interval(name, mean_of_findings(benefit[:, i]))
    second = delong(labels, scores["test"]["base"], scores["test"]["adapted"], test.patients)
    rows = {"recalibration": recalibration, "predictive values": [*predictive.values()], "net benefit": worth}
    rows["CRG score"] = [{"model": name} | with_interval("score", values) for name, values in crg.items()]
    tables = {"subgroups": subgroup_table(labels, scores["test"], test.patients, groups, **drawn)}
    tables |= {name: pd.DataFrame(of) for name, of in rows.items()}
    tables["DeLong"] = second.rename_axis("finding").reset_index()
    curves = {name: net_benefit(labels, said, GRID, weights[:, :1])[0] for name, said in policies.items()}
    return Clinical(tables, curves)
