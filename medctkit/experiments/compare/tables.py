"""The tables of a comparison as text: for a terminal, a page and `tables.json`; and what they say, in sentences."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from medctkit.common.provenance import write_json
from medctkit.experiments.compare.data import HELD_OUT, VARIANTS
from medctkit.experiments.compare.results import (
    EQUAL,
    TEXTS,
    Results,
    best_free,
    ends_of,
    finding_table,
    forgetting_table,
    method_table,
    names_of,
    noise_table,
    pooled,
    rivals_table,
    strength_table,
    unseen_table,
)  # fmt: skip
from medctkit.experiments.compare.runs import GROUPS

if TYPE_CHECKING:
    import pandas as pd


def verdict(results: Results, group: str, one: str, other: str, what: str = "") -> str:
    """A sentence on the paired difference of two methods of a group, "METHOD" or "METHOD, VARIANT", with its interval.

    Args:
        results: of the comparison.
        group: one of `GROUPS`.
        one: the method that should have more.
        other: the one it is held against.
        what: of `Results.draws`, "/home" say; "": the AUROC at the target hospital.
    """
    sides = [names_of(results, group, *name.split(", ")) for name in (one, other)]
    difference, low, high = ends_of("", np.subtract(*(results.mean_draws(names, what) for names in sides))).values()
    a, b = (", ".join([TEXTS[name.split(", ")[0]][0], *name.split(", ")[1:]]) for name in (one, other))
    said = f"{a} and {b} are not told apart"
    if low > 0 or high < 0:
        said = "{} is better than {}".format(*((a, b) if low > 0 else (b, a)))
    return f"{said}: {difference:+.3f} [{low:+.3f}, {high:+.3f}], {len(sides[0])} and {len(sides[1])} runs."


class Shown(NamedTuple):
    """A table as it is shown: the group whose runs it needs, what makes it, columns with their forms, and a note."""

    group: str
    make: Callable[[Results], pd.DataFrame]
    columns: Mapping[str, str]
    note: str = ""


_SCORES = {"": "label", "test AUROC": "auroc:.3f", "over base": "over_base:+.3f", "seeds": "seeds:.0f"}
_TAUGHT = _SCORES | {
    "seeds' sd": "auroc_sd:.3f", "rate": "learning_rate:g", "steps to equal": "steps_to_equal:.0f",
    "trained": "trainable:,.0f",
}  # fmt: skip
_COSTS = {
    "bytes": "adapter_bytes:,.0f", "s/step": "seconds_per_step:.2f", "of full": "seconds_per_step_of_full:.2f",
    "peak bytes": "peak_bytes:.2g", "of full ": "peak_bytes_of_full:.2f",
}  # fmt: skip
TABLES: dict[str, Shown] = {
    "rivals": Shown(
        "rivals",
        rivals_table,
        _SCORES
        | {
            "kind": "kind",
            "LoRA over it": "lora_over:+.3f",
            "home over base": "home_over_base:+.3f",
            "chosen": "chosen",
        },
        "LoRA over it: paired on the same resamples of test patients. *: the lowest or highest rate tried.",
    ),
    "findings": Shown(
        "rivals",
        lambda results: finding_table(results).reset_index(),
        {"": "finding", "base model": "base:.3f", "LoRA": "lora:.3f", "HU in boxes": "boxes:.3f"}
        | {"LoRA over boxes": "lora_over:+.3f"},
    ),
    "unseen": Shown(
        "unseen",
        unseen_table,
        {"": "findings", "prompts": "prompts", "base model": "base:.3f", "adapted": "adapted:.3f"}
        | {"taught all": "taught:.3f", "adapted over base": "gain:+.3f", "taught over base": "taught_gain:+.3f"},
        f"Held out of every loss and choice of 'adapted': {', '.join(HELD_OUT)}. 'taught all' was taught them too.",
    ),
    "placement": Shown("placement", lambda results: method_table(results, "placement"), _TAUGHT),
    "methods": Shown(
        "methods",
        method_table,
        _TAUGHT | _COSTS,
        f"The linear probe knows these 18 answers only. Steps to equal: until {EQUAL:.0%} of LoRA's gain on validation "
        "studies, median over seeds; -: most never had it.",
    ),
    "forgetting": Shown(
        "forgetting",
        forgetting_table,
        _SCORES
        | {
            "home over base": "home_over_base:+.3f",
            "calibration error at home over base": "home_calibration_over_base:+.3f",
        }
        | {"intruders of 10": "intruders:.1f"},
        "; ".join(f"{name}: {does}" for name, does in VARIANTS.items() if name.startswith(("replay", "anchor"))),
    ),
    "strength": Shown(
        "forgetting",
        strength_table,
        {"": "label", "strength": "strength:g", "over base": "over_base:+.3f", "home over base": "home_over_base:+.3f"},
    ),
    "studies": Shown(
        "studies",
        lambda results: pooled(results, "studies").sort_values("studies", kind="stable"),
        {"": "label", "studies": "studies:,.0f"} | dict(list(_SCORES.items())[1:]),
    ),
    "noise": Shown(
        "noise",
        noise_table,
        {"% flipped": "flipped:.0f", "LoRA trained so": "trained:.3f", "lost": "lost:+.3f"}
        | {
            "base measured so": "measured_base:.3f",
            "LoRA measured so": "measured:.3f",
            "gain so": "measured_gain:+.3f",
        },
    ),
    "ranks": Shown(
        "ranks",
        lambda results: pooled(results, "ranks").sort_values("rank", na_position="first"),
        {"rank": "rank:.0f"} | dict(list(_TAUGHT.items())[1:]),
    ),
}


def shown(table: pd.DataFrame, columns: Mapping[str, str]) -> pd.DataFrame:
    """Columns of a table as text: values with their ends where they have some, "-" where there is nothing.

    Args:
        table: one of this module's.
        columns: by heading, the name of the column and, after a colon, how a number is written.
    """
    import pandas as pd

    def text(row: Mapping, name: str, form: str) -> str:
        if not form:
            return str(row[name])
        values = [row[key] for key in (name, f"{name}_low", f"{name}_high") if key in row]
        if values[0] != values[0] or (len(values) > 1 and not any(values)):  # what is missing; a difference to itself
            return "-"
        value, *ends = (f"{0.0 if abs(v) < 5e-4 and '3f' in form else v:{form}}" for v in values)
        return f"{value} [{', '.join(ends)}]" if ends else value

    made = {head: spec.partition(":")[::2] for head, spec in columns.items() if spec.partition(":")[0] in table}
    return pd.DataFrame([{h: text(row, *spec) for h, spec in made.items()} for row in table.to_dict("records")])


def best_free_texts(results: Results) -> list[str]:
    """What LoRA has over the free fix that is best on the test patients, and over the best on validation patients."""
    texts, best = [], best_free(results)
    for place, where in enumerate(("the test patients", "validation patients")[: len(best)]):
        row, (over,) = best.iloc[place], shown(best[place : place + 1], {"over": "lora_over:+.3f"})["over"]
        fix = f"{row['label']} ({row['over_base']:+.3f} over base)"
        texts.append(f"LoRA over the free fix that is best on {where}, {fix}: {over}")
    return texts


def all_tables(results: Results) -> dict[str, pd.DataFrame]:
    """Those of `TABLES` whose runs are there."""
    found = {}
    for name, each in TABLES.items():
        if results.has(each.group):
            try:
                found[name] = each.make(results)
            except ValueError:  # some runs of the group are still to be done
                continue
    return found


def missing(results: Results) -> str:
    """What was not measured yet, and the command that does it; "" if nothing is missing."""
    groups = [group for group in GROUPS if not results.has(group)]
    return f"not measured yet: medctkit compare FOLDER --only {','.join(groups)}" if groups else ""


def show_all(results: Results) -> str:
    """Every table whose runs are there, as text."""
    parts = []
    for name, table in all_tables(results).items():
        parts.append(f"{name}\n{shown(table, TABLES[name].columns).to_string(index=False)}\n{TABLES[name].note}")
    parts += best_free_texts(results) if results.has("rivals") else []
    note = "Mean AUROC over findings and seeds; 95 % intervals: bootstrap over test patients. Phantom data."
    return "\n\n".join([*parts, note, *([missing(results)] if missing(results) else [])])


def write_tables(results: Results, folder: str | os.PathLike) -> None:
    """Write `tables.json`: all tables that are there, with their intervals."""
    content = {}
    for name, table in all_tables(results).items():
        rows = table.drop(columns="names", errors="ignore").round(5)
        content[name] = rows.astype(object).where(rows.notna(), None).to_dict("records")
    write_json(content, Path(folder) / "tables.json")
