"""The clinical part of the report: tables and words from `Clinical`, and what the reporting check-lists ask."""

from collections import Counter
from collections.abc import Callable, Iterator
from importlib.resources import files

import pandas as pd

from medctkit.experiments.measure import Measurement
from medctkit.experiments.report import figures
from medctkit.experiments.report.page import Block, with_ends
from medctkit.findings import CT_RATE_PREVALENCE, PREVALENCE

CHECKLISTS = {
    "CLAIM 2024": "Tejani et al., Radiol Artif Intell 2024, doi 10.1148/ryai.240300",
    "STARD-AI": "Sounderajah et al., Nat Med 2025, doi 10.1038/s41591-025-03953-8",
    "TRIPOD+AI": "Collins et al., BMJ 2024, doi 10.1136/bmj-2023-078378",
}


def in_text(table: pd.DataFrame) -> pd.DataFrame:
    """A table of numbers as it is shown: x, x_low and x_high become one column, "x [low, high]"."""
    shown = {}
    for name in table:
        if f"{name}_low" in table:
            sign = "+" if name in ("difference", "against the rest") else ""
            shown[name] = [with_ends(row, name, sign) for _, row in table.iterrows()]
        elif not name.endswith(("_low", "_high")):
            kind = table[name].dtype.kind
            shown[name] = [
                f"{x:.3g}".replace("nan", "-") if kind == "f" else ("", "yes")[x] if kind == "b" else x
                for x in table[name]
            ]
    return type(table)(shown)


def apart(table: pd.DataFrame, column: str) -> pd.Series:
    """In which rows of a table the interval of a column leaves out 0."""
    return (table[f"{column}_low"] > 0) | (table[f"{column}_high"] < 0)


def parts(measured: Measurement) -> Iterator[tuple[str, str, str, pd.DataFrame]]:
    """Title, words that follow from the numbers, caption and table of each part of what was `measured`."""
    assert measured.clinical is not None
    tables = measured.clinical.tables

    def named(names: pd.Series) -> str:
        return f"{len(names)}{': ' if len(names) else ''}{', '.join(map(str, names))}"

    table = tables["subgroups"]
    other = table.loc[apart(table, "against the rest"), "subgroup"]
    words = f"Subgroups of {len(table)} in which the adapted model's mean AUROC differs from that of the rest, by an "
    words += f"interval without 0: {named(other)}. Nothing is corrected for so many comparisons (both rows of a trait "
    words += "with two groups, such as sex, are one): of twenty, one would differ by chance. A study of which nothing "
    words += "is known is in none."
    yield "Subgroups", words, "Mean AUROC, and the adapted model against the rest.", table
    table = tables["recalibration"]
    chosen = [f"{row['method']} for the {row['model']} model" for _, row in table[table["chosen"]].iterrows()]
    words = f"Chosen on validation patients, by the Brier score on a fifth of them left out: {', '.join(chosen)}. The "
    words += "curves were fitted on all of them; the numbers are of test patients. A change of AUROC is no "
    words += "calibration: a flat stair of the isotonic curve makes ties, a falling line turns round a score that "
    words += "pointed the wrong way."
    yield "Calibration made anew", words, "Before and after, means over findings.", table
    whose = "of CT-RATE's training scans" if PREVALENCE == CT_RATE_PREVALENCE else "that the table of findings gives"
    words = f"At thresholds from validation patients and the prevalence {whose}, not that of these."
    yield "Predictive values", words, "Positive (PPV) and negative (NPV).", tables["predictive values"]
    table = tables["net benefit"]
    useful = table.loc[table["adapted_low"] > table["everybody_high"].clip(lower=0), "threshold"]
    words = f"Thresholds of {len(table)} at which the adapted model's interval lies above acting on nobody, and above "
    words += f"the interval of acting on everybody: {named(useful)}. Scores are recalibrated as chosen on validation "
    words += "patients. At a threshold of 0.1 one hit is worth nine false alarms, at 0.5 one."
    yield "Decision curves", words, "Mean net benefit over findings.", table
    words = "The CRG score (arXiv 2505.17167) weighs hits, misses and false alarms by how many there can be. Always "
    words += "yes and always no both get 0.333, everything right gets 1."
    yield "CRG score", words, "At thresholds from validation patients.", tables["CRG score"]
    second, first = tables["DeLong"].set_index("finding"), measured.difference
    differ = first.index[apart(first, "auroc") != apart(second, "auroc").loc[first.index]]
    words = f"Findings, and mean, of which the two do not agree whether the interval holds 0: {named(differ)}."
    both = {"finding": first.index}
    for name, table in (("bootstrap", first), ("DeLong", second.loc[first.index])):
        both[f"{name}, adapted minus base"] = [with_ends(row, "auroc", "+") for _, row in table.iterrows()]
        both[f"{name}, p"] = [f"{p:.2g}" if p == p else "-" for p in table["auroc_p"]]
    yield "DeLong's test beside the bootstrap", words, "Two ways to one interval.", pd.DataFrame(both)


def checklists() -> pd.DataFrame:
    """`assets/checklists.csv`: a row for each question, its items in three check-lists, whether and where answered."""
    return pd.read_csv(str(files("medctkit") / "assets" / "checklists.csv"), dtype=str, keep_default_na=False)


def clinical_blocks(measured: Measurement, table: Callable[..., Block], figure: Callable[..., Block]) -> list[Block]:
    """The part of the page that shows `measured.clinical`; `table` and `figure` make blocks of a text and a content."""
    found: list[Block] = []
    for title, words, caption, content in parts(measured) if measured.clinical else ():
        found += [Block("heading", title), Block("text", words)]
        if title == "Decision curves":
            found.append(figure("decision", lambda: figures.decision_curves(measured), "Net benefit by finding."))
        found.append(table(caption, in_text(content)))
    asked = checklists()
    counts = Counter(asked["answered"])
    told = ", ".join(f"{counts[kind]} {kind}" for kind in ("yes", "partly", "no", "not applicable"))
    lists = "; ".join(f"{name} ({source})" for name, source in CHECKLISTS.items())
    words = (
        f"{len(asked)} questions, in words of ours, cover every item of {lists}. Answered: {told}. Filled in by the "
    )
    words += "authors; a paper of yours needs its own."
    return [*found, Block("heading", "What check-lists ask"), Block("text", words), Block("table", "Items.", asked)]
