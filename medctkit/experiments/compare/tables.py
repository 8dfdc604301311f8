"""The tables of a comparison as text: for a terminal, a page and `tables.json`; and what they say, in sentences."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from medctkit.common.provenance import records, write_json
from medctkit.experiments.compare.data import HELD_OUT, VARIANTS
from medctkit.experiments.compare.results import (
    EQUAL,
    Results,
    best_free,
    difference_of_means,
    finding_table,
    forgetting_table,
    label_of,
    method_table,
    names_of,
    noise_table,
    pooled,
    rivals_table,
    strength_table,
    unseen_table,
)
from medctkit.experiments.compare.runs import BASE, GROUPS, Job
from medctkit.findings import FINDINGS
from medctkit.lora.methods import METHODS


def verdict(results: Results, group: str, one: str, other: str, what: str = "") -> str:
    """A sentence on the paired difference of two methods of a group, "METHOD" or "METHOD, VARIANT", with its interval.

    The difference is of the first that is named from the second; where it is not chance, the better one is named first.
    `what` is of `Results.draws`, "/home" say; "": the AUROC at the target hospital. See `difference_of_means`.
    """
    pairs = [name.split(", ") for name in (one, other)]
    sides = [names_of(results, group, *pair) for pair in pairs]
    a, b = labels = [label_of(*pair) for pair in pairs]
    steps = results.runs.set_index("name")["best_step"]
    for (method, *_), label, names in zip(pairs, labels, sides, strict=True):
        if method in METHODS and (steps[list(names)] == 0).all():
            why = f"no step of {label} was better than the base model, {len(names)} runs."
            return f"{a} and {b} are not compared: {why}"
    difference, low, high = difference_of_means(results, sides[0], sides[1], what)
    if high < 0:
        return verdict(results, group, other, one, what)
    said = f"{a} is better than {b}" if low > 0 else f"{a} and {b} are not told apart"
    return f"{said}: {difference:+.3f} [{low:+.3f}, {high:+.3f}], {len(sides[0])} and {len(sides[1])} runs."


class Shown(NamedTuple):
    """A table as it is shown: the group whose runs it needs, what makes it, its columns, and a note."""

    group: str
    make: Callable[[Results], pd.DataFrame]
    columns: str
    note: str = ""


_SCORES = "label auroc over_base seeds"
_TAUGHT = f"{_SCORES} auroc_sd stayed learning_rate dialect steps_to_equal trainable"
_COSTS = "adapter_bytes seconds_per_step seconds_per_step_of_full peak_bytes peak_bytes_of_full"
TABLES: dict[str, Shown] = {
    "rivals": Shown(
        "rivals", rivals_table, f"{_SCORES} kind lora_over home_over_base chosen",
        "Lora over: LoRA minus this, paired on the same resamples of test patients.",
    ),
    "findings": Shown("rivals", lambda found: finding_table(found).reset_index(), "finding base lora boxes lora_over"),
    "loss": Shown(
        "loss", lambda found: method_table(found, "loss"),
        f"{_SCORES} auroc_sd stayed learning_rate dialect test_calibration_error home_over_base",
        "; ".join(f"{name}: {VARIANTS[name]}" for name in ("prevalence", "contrastive")),
    ),
    "unseen": Shown(
        "unseen", unseen_table, "findings prompts base adapted gain taught taught_gain",
        f"Held out of every loss and choice of 'adapted': {', '.join(HELD_OUT)}. 'taught' was taught them too.",
    ),
    "placement": Shown("placement", lambda found: method_table(found, "placement"), _TAUGHT),
    "methods": Shown(
        "methods", method_table, f"{_TAUGHT} {_COSTS}",
        f"The linear probe knows these {len(FINDINGS)} answers only. Stayed: so many runs kept the base model, as no "
        f"validated step was better. Steps to equal: until {EQUAL:.0%} of LoRA's gain on validation studies, median "
        "over seeds; -: most never had it. Seconds and peak bytes: of a step, alone; what differs by less than a "
        "quarter is noise.",
    ),
    "forgetting": Shown(
        "forgetting", forgetting_table, f"{_SCORES} home_over_base home_calibration_over_base intruders",
        "; ".join(f"{name}: {does}" for name, does in VARIANTS.items() if name.startswith(("replay", "anchor"))),
    ),
    "strength": Shown("forgetting", strength_table, "label strength over_base home_over_base"),
    "studies": Shown("studies", lambda found: pooled(found, "studies").sort_values("studies"), f"studies {_SCORES}"),
    "noise": Shown("noise", noise_table, "flipped trained lost measured_base measured measured_gain"),
    "ranks": Shown("ranks", lambda found: pooled(found, "ranks").sort_values("rank"), f"rank {_TAUGHT}"),
}  # fmt: skip
_FORMS = {"learning_rate": "g", "strength": "g", "peak_bytes": ",.0f", "intruders": ".1f", "seconds_per_step": ".2f"}
_FORMS |= dict.fromkeys(
    ("trainable", "adapter_bytes", "studies", "seeds", "rank", "flipped", "steps_to_equal", "stayed"), ",.0f"
)


def shown(table: pd.DataFrame, columns: str) -> pd.DataFrame:
    """Columns of a table as text: values with their ends where they have some, "-" where there is nothing.

    `columns` are names with spaces between them.
    """

    def text(row: Mapping, name: str) -> str:
        values = [row[key] for key in (name, f"{name}_low", f"{name}_high") if key in row]
        if isinstance(values[0], str):
            return values[0]
        if values[0] != values[0] or (len(values) > 1 and not any(values)):  # what is missing; a difference to itself
            return "-"
        sign = "+" if name.endswith(("over_base", "lora_over", "gain", "lost")) else ""
        form = _FORMS.get(name, f"{sign}.3f")
        value, *ends = (f"{0.0 if abs(v) < 5e-4 and '3f' in form else v:{form}}" for v in values)
        value += "*" * (name == "learning_rate" and bool(row.get("at_edge")))
        return f"{value} [{', '.join(ends)}]" if ends else value

    names = {name: name.replace("_", " ").replace("label", "").replace("auroc", "AUROC") for name in columns.split()}
    return pd.DataFrame([{names[name]: text(row, name) for name in names} for row in table.to_dict("records")])


def best_free_texts(results: Results) -> list[str]:
    """What LoRA has over the free fix that is best on the test patients, and over the best on validation patients."""
    texts, best = [], best_free(results)
    for place, where in enumerate(("the test patients", "validation patients")[: len(best)]):
        row, (over,) = best.iloc[place], shown(best[place : place + 1], "lora_over")["lora over"]
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
    """What was not measured, with the command that does it, or less often than the rest, and what diverged; or ""."""
    groups, every = [group for group in GROUPS if not results.has(group)], results.runs["studies"].max()
    seeds = len({*results.runs["seed"], *results.diverged["seed"]})
    few, lost = {}, {}
    for job in (job for group in GROUPS if group not in groups for job in GROUPS[group]):
        if (job.studies or 0) >= every:  # larger sizes are left out
            continue
        done, diverged = (_of_job(table, job, every) for table in (results.runs, results.diverged))
        wanted = seeds if job.trains or job.studies else 1
        of = f", rank {job.rank}" * (job.group == "ranks") + f", {job.studies} studies" * bool(job.studies)
        name = label_of(job.method, job.variant) + of
        if diverged:
            lost[name] = f"{diverged} of {wanted}"
        if done + diverged < wanted:
            few[name] = f"{done} of {wanted}"
    said = [f"not measured yet: medctkit compare FOLDER --only {','.join(groups)}"] if groups else []
    for what, runs in (("runs still to be done", few), ("diverged, and left out", lost)):
        said += [f"{what}: {', '.join(f'{name} ({n})' for name, n in runs.items())}"] if runs else []
    return "; ".join(said)


def _of_job(table: pd.DataFrame, job: Job, every: float) -> int:
    """How many rows are of a job with any seed; `every`: all training studies, where they were ever used."""
    same = table["group"] == job.group
    for key in ("method", "variant", "rank"):
        value = getattr(job, key)
        same &= value is None or table[key] == value
    return int((same & (job.method == BASE or table["studies"] == (job.studies or every))).sum())


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
    tables = {name: each.drop(columns="names", errors="ignore").round(5) for name, each in all_tables(results).items()}
    write_json({name: records(table) for name, table in tables.items()}, Path(folder) / "tables.json")
