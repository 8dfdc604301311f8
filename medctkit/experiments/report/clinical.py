"""The clinical part of the report: tables and words from `Clinical`, and what the reporting check-lists ask."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable
from importlib.resources import files
from typing import TYPE_CHECKING

from medctkit.experiments.clinical import MARKED, Clinical
from medctkit.experiments.measure import Measurement
from medctkit.experiments.report import figures
from medctkit.experiments.report.page import Block, with_ends

if TYPE_CHECKING:
    import pandas as pd

CHECKLISTS = {
    "CLAIM 2024": "Tejani et al., Radiol Artif Intell 2024, doi 10.1148/ryai.240300",
    "STARD-AI": "Sounderajah et al., Nat Med 2025, doi 10.1038/s41591-025-03953-8",
    "TRIPOD+AI": "Collins et al., BMJ 2024, doi 10.1136/bmj-2023-078378",
}


def subgroups(clinical: Clinical) -> tuple[str, pd.DataFrame]:
    """Words and a row for each subgroup of `clinical`."""
    table = clinical.subgroups
    shown = table[["characteristic", "subgroup", "studies", "patients", "findings"]].copy()
    for name in ("base", "adapted", "difference", "against the rest"):
        sign = "" if name in ("base", "adapted") else "+"
        shown[name] = [with_ends(row, name, sign) for _, row in table.iterrows()]
    shown["warning"] = table["warning"]
    apart = [
        f"{row['subgroup']} ({row['against the rest']:+.3f})"
        for _, row in table.iterrows()
        if row["against the rest_low"] > 0 or row["against the rest_high"] < 0
    ]
    words = (
        f"The adapted model's mean AUROC differs from that of the rest, by an interval without 0, in {len(apart)} of "
    )
    words += f"{len(table)} subgroups{': ' if apart else ''}{', '.join(apart)}. Nothing is corrected for so many "
    return (
        words + "comparisons: of twenty, one would differ by chance. Where nothing is known, a study is in none.",
        shown,
    )


def recalibration(clinical: Clinical) -> tuple[str, pd.DataFrame]:
    """Words and a row for each model and recalibration of `clinical`."""
    import pandas as pd

    columns = {"auroc": "mean AUROC", "calibration_error": "calibration error", "brier": "Brier score"}
    shown, words = [], []
    for _, row in clinical.recalibration.iterrows():
        first = {"model": row["model"], "recalibration": row["method"], "validation Brier": f"{row['validation']:.3f}"}
        values = {name: with_ends(row, column) for column, name in columns.items()}
        shown.append(first | values | {"chosen": "yes" if row["chosen"] else ""})
        if row["chosen"]:
            words.append(f"{row['method']} for the {row['model']} model")
    text = f"Chosen on validation patients, by the Brier score on a fifth of them left out: {', '.join(words)}. "
    text += """The curves were fitted on all of them; the numbers are of test patients. A change of AUROC is no
    calibration: a flat stair of the isotonic curve makes ties, and a falling line turns round a score that pointed the
    wrong way."""
    return " ".join(text.split()), pd.DataFrame(shown)


def predictive_values(clinical: Clinical) -> pd.DataFrame:
    """A row for each finding: both models' predictive values in `clinical`, and the prevalence they are for."""
    import pandas as pd

    rows: dict[str, dict[str, str]] = {}
    for _, row in clinical.predictive.iterrows():
        shown = rows.setdefault(row["finding"], {"finding": row["finding"], "prevalence": f"{row['prevalence']:.1%}"})
        shown |= {f"{row['model']} {name.upper()}": with_ends(row, name) for name in ("ppv", "npv")}
    return pd.DataFrame(list(rows.values()))


def decision(clinical: Clinical) -> tuple[str, pd.DataFrame]:
    """Words and a row for each marked threshold of `clinical`: mean net benefit over findings of each policy."""
    shown = clinical.decision.assign(text=[with_ends(row, "value") for _, row in clinical.decision.iterrows()])
    shown = shown.pivot(index="threshold", columns="policy", values="text")[["everybody", "base", "adapted"]]
    shown.insert(0, "nobody", "0")
    value = clinical.decision.set_index(["threshold", "policy"])
    useful = [
        f"{t:g}" for t in MARKED if value.loc[(t, "adapted"), "low"] > max(0, value.loc[(t, "everybody"), "high"])
    ]
    words = (
        f"At {len(useful)} of {len(MARKED)} thresholds{': ' if useful else ''}{', '.join(useful)}, the adapted model's "
    )
    words += (
        "interval lies above both acting on nobody and the interval of acting on everybody. Scores are recalibrated "
    )
    return words + "as chosen on validation patients. A threshold of 0.1: one hit is worth nine false alarms.", (
        shown.reset_index()
    )


def second_test(measured: Measurement) -> tuple[str, pd.DataFrame]:
    """Words and a row for each finding: the `measured` difference in AUROC by the bootstrap and by DeLong's test."""
    import pandas as pd

    assert measured.clinical is not None
    ways = {"bootstrap": measured.difference, "DeLong": measured.clinical.delong.loc[measured.difference.index]}
    shown, apart = {"finding": measured.difference.index}, {}
    for name, table in ways.items():
        shown[f"{name}, adapted minus base"] = [with_ends(row, "auroc", "+") for _, row in table.iterrows()]
        shown[f"{name}, p"] = [f"{p:.2g}" if p == p else "-" for p in table["auroc_p"]]
        apart[name] = (table["auroc_low"] > 0) | (table["auroc_high"] < 0)
    differ = apart["bootstrap"].index[apart["bootstrap"] != apart["DeLong"]].tolist()
    words = f"Whether the interval holds 0, the two say {'otherwise of ' + ', '.join(differ) if differ else 'alike'}."
    return words, pd.DataFrame(shown)


def checklists() -> pd.DataFrame:
    """`assets/checklists.csv`: a row for each question, its items in three check-lists, whether and where answered."""
    import pandas as pd

    lines = (files("medctkit") / "assets" / "checklists.csv").read_text(encoding="utf-8").splitlines()
    return pd.DataFrame(list(csv.DictReader(lines)))


def clinical_blocks(measured: Measurement, table: Callable[..., Block], figure: Callable[..., Block]) -> list[Block]:
    """The part of the page that shows `measured.clinical`; `table` and `figure` make blocks of a text and a content."""
    found: list[Block] = []
    if clinical := measured.clinical:
        crg = clinical.crg.assign(score=[with_ends(row, "value") for _, row in clinical.crg.iterrows()])

        def part(title: str, words: str, *blocks: Block) -> None:
            found.extend([Block("heading", title), *([Block("text", words)] if words else []), *blocks])

        if len(clinical.subgroups):
            words, content = subgroups(clinical)
            part("Subgroups", words, table("Mean AUROC, and the adapted model against the rest.", content))
        else:  # of scans without these, such as LIDC-IDRI's
            part("Subgroups", "Neither sex, age, scanner nor kernel of these patients is known: there are none.")
        words, content = recalibration(clinical)
        part("Calibration made anew", words, table("Before and after, means over findings.", content))
        by = "At thresholds from validation patients and the prevalence of CT-RATE's training scans, not that of these."
        part("Predictive values", "", table(by, predictive_values(clinical)))
        words, content = decision(clinical)
        curves = figure("decision", lambda: figures.decision_curves(measured), "Net benefit, finding by finding.")
        part("Decision curves", words, curves, table("Mean net benefit over findings.", content))
        words = (
            "The CRG score (arXiv 2505.17167) weighs hits, misses and false alarms by how many there can be. Always "
        )
        words += "yes and always no both get 0.333, everything right gets 1."
        part("CRG score", words, table("At thresholds from validation patients.", crg[["model", "score"]]))
        words, content = second_test(measured)
        part("DeLong's test beside the bootstrap", words, table("Two ways to one interval.", content))
    asked = checklists()
    counts = Counter(asked["answered"])
    told = ", ".join(f"{counts[kind]} {kind}" for kind in ("yes", "partly", "no", "not applicable"))
    words = f"{len(asked)} questions cover every item of {'; '.join(f'{k} ({v})' for k, v in CHECKLISTS.items())}, in "
    words += f"words of ours. Answered: {told}. Filled in by the authors; a paper of yours needs its own."
    return [*found, Block("heading", "What check-lists ask"), Block("text", words), Block("table", "Items.", asked)]
