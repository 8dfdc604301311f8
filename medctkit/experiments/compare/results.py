"""What a comparison found: its files read, seeds pooled, tables, and the tables as text.

An interval of a mean over seeds is a bootstrap over test patients: in each resample all seeds are scored on the same
patients, and their mean AUROCs averaged. It says how sure we are for these trained models on other patients; how much
another seed would change is `auroc_sd`, beside it. Differences, to the base model or to LoRA, are taken within each
resample. Findings with one class in the test studies, or in a resample of them, are left out of its mean.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medctkit.experiments.compare.data import HELD_OUT
from medctkit.experiments.compare.rivals import RIVALS
from medctkit.experiments.compare.runs import BASE, PROBE
from medctkit.findings import FINDINGS
from medctkit.lora.methods import METHODS
from medctkit.metrics.bootstrap import interval, mean_of_findings
from medctkit.zero_shot.prompts import PROMPTS

if TYPE_CHECKING:
    import pandas as pd

SAVED = Path(str(files("medctkit") / "assets" / "comparison"))
KEYS = ["group", "method", "rank", "studies", "learning_rate", "dialect", "unseen"]
TEXTS = {  # label, what it trains, paper
    BASE: ("base model", "Nothing: the base model as it is, zero-shot.", ""),
}
TEXTS |= {name: (rival.label, rival.does, rival.source) for name, rival in RIVALS.items()}
TEXTS |= {name: (method.label, method.trains, method.paper) for name, method in METHODS.items()}
KINDS = ("free", "same labels", "trained")  # no label of the target hospital; labels, but no gradient; both


@dataclass(frozen=True)
class Results:
    """What `medctkit compare` wrote: a row for each job, and seconds and memory of a step of each method, if measured.

    `draws` has for each run's name its mean AUROC on the test studies, then on each bootstrap resample of their
    patients; resample i is the same in all runs. Where tables need them, there are also "NAME/home", the same of the
    source hospital's test studies, "NAME/findings", (1 + resamples, 18), and "NAME/held out/PROMPTS" and
    "NAME/seen/PROMPTS", over some findings.
    """

    runs: pd.DataFrame
    draws: dict[str, np.ndarray]
    costs: pd.DataFrame

    def has(self, group: str) -> bool:
        """Whether a group has runs of its own, not only such as other groups share with it."""
        runs = self.runs[self.runs["group"] == group]
        own = {"rivals": runs["method"].isin(set(RIVALS) - {PROBE}), "unseen": runs["unseen"].astype(bool)}
        return bool(own.get(group, runs["method"] != BASE).any())

    def mean_draws(self, names: Sequence[str], what: str = "") -> np.ndarray:
        """Draws (1 + resamples,) of some runs, their seeds averaged; NaN where they were not kept."""
        if any(name + what not in self.draws for name in names):
            return np.full_like(self.draws[names[0]], np.nan, dtype=float)
        return np.mean([self.draws[name + what].astype(float) for name in names], axis=0)


def load_results(folder: str | os.PathLike = SAVED) -> Results:
    """Read the results in a folder; those that come with the package by default."""
    import pandas as pd

    folder = Path(folder)
    for name in ("comparison.csv", "draws.npz"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}; `medctkit compare {folder}` makes it")
    with np.load(folder / "draws.npz", allow_pickle=False) as file:
        draws = {name: file[name] for name in file.files}
    runs = pd.read_csv(folder / "comparison.csv", dtype={"chosen": str})
    for column, value in (("dialect", "target"), ("unseen", False), ("chosen", "")):  # results of before 0.2 lack them
        runs[column] = runs[column].fillna(value) if column in runs else value
    costs = folder / "costs.csv"
    columns = ["method", "seconds_per_step", "seconds_per_step_of_full", "peak_bytes", "peak_bytes_of_full"]
    return Results(runs, draws, pd.read_csv(costs) if costs.is_file() else pd.DataFrame(columns=columns))


def _ends(name: str, draws: np.ndarray) -> dict[str, float]:
    low, high = interval(draws)
    return {name: draws[0], f"{name}_low": low, f"{name}_high": high}


def pooled(results: Results, group: str) -> pd.DataFrame:
    """The runs of a group with their seeds put together.

    Returns:
        A row for each method, rank, number of studies and so on: `names` and `seeds` (how many) of its runs, `auroc`
        (mean over them) with `auroc_low` and `auroc_high`, `auroc_sd` over seeds, `over_base` (the difference to the
        base model) with its ends, `home` and `home_over_base`, the same at the source hospital, `trainable`,
        `adapter_bytes`, `validation_auroc`, calibration errors. 95 % intervals; see the module.

    Raises:
        ValueError: no run of that group.
    """
    import pandas as pd

    runs = results.runs[results.runs["group"] == group]
    if runs.empty:
        there = ", ".join(sorted(results.runs["group"].unique()))
        raise ValueError(f"no runs of group {group!r}; there are {there}. medctkit compare FOLDER --only {group}")
    base = [results.runs.loc[results.runs["method"] == BASE, "name"].iloc[0]]
    means = ["trainable", "adapter_bytes", "validation_auroc", "test_calibration_error", "home_calibration_error"]
    rows = []
    for key, same in runs.groupby(KEYS, dropna=False, sort=False):
        names = tuple(same["name"])
        row = dict(zip(KEYS, key, strict=True)) | {"seeds": len(same), "names": names, "chosen": same["chosen"].iloc[0]}
        for what, name in (("", "auroc"), ("/home", "home")):
            of, before = (results.mean_draws(each, what) for each in (names, base))
            row |= _ends(name, of) | _ends("over_base" if name == "auroc" else f"{name}_over_base", of - before)
        row["auroc_sd"] = np.std([results.draws[name][0] for name in names], ddof=1) if len(names) > 1 else np.nan
        rows.append(row | same.reindex(columns=means).mean().to_dict())
    return pd.DataFrame(rows)


def method_table(results: Results) -> pd.DataFrame:
    """A row for each method, the base model first: what it trains, what it scores on test studies, what it costs."""
    table = pooled(results, "methods").merge(results.costs, on="method", how="left")
    for i, column in enumerate(("label", "trains", "paper")):
        table[column] = [TEXTS[name][i] for name in table["method"]]
    table["any_prompt"] = table["method"] != PROBE
    full = table.loc[table["method"] == "full", "trainable"]
    table["trainable_share"] = table["trainable"] / (full.iloc[0] if len(full) else np.nan)
    return table.sort_values("method", key=lambda names: names.map(list(TEXTS).index), ignore_index=True)


def rivals_table(results: Results) -> pd.DataFrame:
    """LoRA beside everything else that might do as well.

    Returns:
        `pooled`, a row for the base model, each free fix, each rival, LoRA in either encoder and in both, and full
        fine-tuning; and `label`, `does`, `kind` (one of `KINDS`), `labels` (what it does with labels of the target
        hospital: none, choose, learn), `lora_over` with its ends (LoRA minus this, paired), and `at_edge`: the rate
        chosen is the lowest or highest of its grid, so that one outside might be better.
    """
    import pandas as pd

    table = pooled(results, "rivals")
    table["labels"] = ["none" if m == BASE else RIVALS[m].labels if m in RIVALS else "learn" for m in table["method"]]
    table["kind"] = [
        KINDS[0] if labels == "none" else KINDS[1] if method in RIVALS else KINDS[2]
        for method, labels in zip(table["method"], table["labels"], strict=True)
    ]
    table["label"], table["does"] = ([TEXTS[name][i] for name in table["method"]] for i in (0, 1))
    table["at_edge"] = [
        row.method in METHODS and row.learning_rate in {f(METHODS[row.method].learning_rates) for f in (min, max)}
        for row in table.itertuples()
    ]
    ours = table.loc[table["method"] == "lora", "names"]
    lora = results.mean_draws(ours.iloc[0]) if len(ours) else np.nan
    against = [_ends("lora_over", lora - results.mean_draws(names)) for names in table["names"]]
    table = pd.concat([table, pd.DataFrame(against)], axis=1)
    order = [BASE, *RIVALS, *METHODS]
    return table.sort_values("method", key=lambda names: names.map(order.index), ignore_index=True)


def finding_table(results: Results) -> pd.DataFrame:
    """LoRA against logistic regression on HU in boxes, finding by finding and on average.

    Returns:
        Indexed by finding, the greatest lead of LoRA first, the mean last: `base`, `lora`, `boxes`, `lora_over` (LoRA
        minus boxes, paired), with their ends.
    """
    import pandas as pd

    table = rivals_table(results).set_index("method")
    of = {}
    for name, method in (("base", BASE), ("lora", "lora"), ("boxes", "hu-boxes")):
        if method not in table.index:
            raise ValueError(f"no run of {method!r} in group 'rivals'. medctkit compare FOLDER --only rivals")
        each = results.mean_draws(table.loc[method, "names"], "/findings")
        of[name] = np.concatenate([each, mean_of_findings(each)[:, None]], axis=1)  # (1 + resamples, 19)
    of["lora_over"] = of["lora"] - of["boxes"]
    columns = {name: values for key, draws in of.items() for name, values in _ends(key, draws).items()}
    found = pd.DataFrame(columns, index=pd.Index([*FINDINGS, "mean"], name="finding"))
    return pd.concat([found[:-1].sort_values("lora_over", ascending=False), found[-1:]])


def unseen_table(results: Results) -> pd.DataFrame:
    """What LoRA does to findings that no loss of it ever saw, beside those that it was taught, in all sets of prompts.

    Returns:
        A row for each of "held out" (the mean of `HELD_OUT`) and "seen" (of the other findings), and each set of
        prompts: `base`, `adapted` (LoRA without the held-out findings and without reports), `gain` between them, and
        `taught` (LoRA with all findings and reports) and `taught_gain`, with their ends.
    """
    import pandas as pd

    runs = pooled(results, "unseen")
    names = {}
    for what, chosen in (
        ("base", runs["method"] == BASE),
        ("adapted", runs["unseen"].astype(bool)),
        ("taught", (runs["method"] == "lora") & ~runs["unseen"].astype(bool)),
    ):
        if not chosen.any():
            raise ValueError(f"group 'unseen' has no run of {what!r} yet. medctkit compare FOLDER --only unseen")
        names[what] = runs.loc[chosen, "names"].iloc[0]
    rows = []
    for findings in ("held out", "seen"):
        for prompts in PROMPTS:
            of = {what: results.mean_draws(each, f"/{findings}/{prompts}") for what, each in names.items()}
            of |= {"gain": of["adapted"] - of["base"], "taught_gain": of["taught"] - of["base"]}
            row: dict[str, object] = {"findings": findings, "prompts": prompts}
            rows.append(row | {key: end for what, draws in of.items() for key, end in _ends(what, draws).items()})
    return pd.DataFrame(rows)


# --- as text --------------------------------------------------------------------------------------------


def _ranges(table: pd.DataFrame, name: str, form: str = ".3f") -> list[str]:
    """Values with their ends; "-" where there is none, or a difference is one to itself."""
    ends = table[[name, f"{name}_low", f"{name}_high"]].astype(float)
    rows = (ends.round(3) + 0.0).itertuples(index=False)  # no -0.000
    return [
        f"{v:{form}} [{low:{form}}, {high:{form}}]" if v == v and any((v, low, high)) else "-" for v, low, high in rows
    ]


def _numbers(values: pd.Series, form: str) -> pd.Series:
    return values.map(form.format).where(values.notna(), "-")


def show(table: pd.DataFrame) -> str:
    """`method_table` as text for a terminal."""
    import pandas as pd

    shown = pd.DataFrame({"method": table["label"].where(table["any_prompt"], table["label"] + " (18 answers only)")})
    shown["test AUROC"] = _ranges(table, "auroc")
    shown["over base"] = _ranges(table, "over_base", "+.3f")
    shown["seeds"] = table["seeds"]
    for name, column, form in (
        ("learning rate", "learning_rate", "{:g}"),
        ("trainable", "trainable", "{:,.0f}"),
        ("bytes", "adapter_bytes", "{:,.0f}"),
        ("s/step", "seconds_per_step", "{:.2f}"),
        ("of full", "seconds_per_step_of_full", "{:.2f}"),
        ("peak MB", "peak_bytes", "{:.0f}"),
        ("of full ", "peak_bytes_of_full", "{:.2f}"),
    ):
        shown[name] = _numbers(table[column] / 1e6 if column == "peak_bytes" else table[column], form)
    note = "Mean AUROC over findings and seeds; 95 % intervals: bootstrap over test patients. Phantom data."
    return f"{shown.to_string(index=False)}\n{note}"


def show_rivals(table: pd.DataFrame) -> str:
    """`rivals_table` as text for a terminal, and what LoRA has over the best free fix."""
    import pandas as pd

    shown = pd.DataFrame({"": table["label"], "kind": table["kind"], "labels": table["labels"]})
    shown["test AUROC"], shown["over base"] = _ranges(table, "auroc"), _ranges(table, "over_base", "+.3f")
    shown["LoRA over it"], shown["home AUROC"] = _ranges(table, "lora_over", "+.3f"), _ranges(table, "home")
    shown["home over base"] = _ranges(table, "home_over_base", "+.3f")
    shown["ECE"] = _numbers(table["test_calibration_error"], "{:.3f}")
    shown["home ECE"] = _numbers(table["home_calibration_error"], "{:.3f}")
    shown["chosen"] = [
        f"{row.learning_rate:g}{'*' if row.at_edge else ''}, {row.dialect}" if row.method in METHODS else row.chosen
        for row in table.itertuples()
    ]
    note = "LoRA over it: paired on the same resamples of test patients. *: the lowest or highest rate tried."
    free, lora = table[(table["kind"] == KINDS[0]) & (table["method"] != BASE)], table[table["method"] == "lora"]
    if len(free) and len(lora):
        best, gain = free.loc[free["auroc"].idxmax()], lora["over_base"].iloc[0]
        (over,) = _ranges(pd.DataFrame([best]), "lora_over", "+.3f")
        note += f"\nLoRA over the best free fix, {best['label']} (best on the test patients): {over}; "
        note += f"that fix has {best['over_base']:+.3f}, LoRA {gain:+.3f} over the base model."
    return f"{shown.to_string(index=False)}\n{note}"


def show_findings(table: pd.DataFrame) -> str:
    """`finding_table` as text for a terminal."""
    import pandas as pd

    named = {"base": "base model", "lora": "LoRA", "boxes": "HU in boxes"}
    shown = pd.DataFrame({label: _ranges(table, name) for name, label in named.items()}, index=table.index)
    shown["LoRA over boxes"] = _ranges(table, "lora_over", "+.3f")
    return shown.to_string(index_names=False)


def show_unseen(table: pd.DataFrame) -> str:
    """`unseen_table` as text for a terminal."""
    shown = table[["findings", "prompts"]].copy()
    for name, label in (("base", "base model"), ("adapted", "adapted"), ("taught", "taught all")):
        shown[label] = _ranges(table, name)
    shown["adapted over base"], shown["taught over base"] = (
        _ranges(table, name, "+.3f") for name in ("gain", "taught_gain")
    )
    note = f"Held out of every loss and choice of 'adapted': {', '.join(HELD_OUT)}. 'taught all' was taught them too."
    return f"{shown.to_string(index=False)}\n{note}"


def show_all(results: Results) -> str:
    """Every table whose runs are there, as text."""
    shown = [show(method_table(results))] if results.has("methods") else []
    if results.has("rivals"):
        shown += [show_rivals(rivals_table(results))]
        if {"lora", "hu-boxes"} <= set(results.runs.loc[results.runs["group"] == "rivals", "method"]):
            shown += [show_findings(finding_table(results))]
    if results.has("unseen"):
        shown += [show_unseen(unseen_table(results))]
    return "\n\n".join(shown)
