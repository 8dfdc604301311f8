"""What a comparison found: its files read, seeds pooled, and tables of them; `tables` shows these.

An interval of a mean over seeds is a bootstrap over test patients: in each resample all seeds are scored on the same
patients, and their mean AUROCs averaged. It says how sure we are for these trained models on other patients; how much
another seed would change is `auroc_sd`, beside it. Differences, to the base model or to LoRA, are taken within each
resample. Findings with one class in the test studies, or in a resample of them, are left out of its mean.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from medctkit.experiments.compare.rivals import RIVALS
from medctkit.experiments.compare.runs import BASE, PROBE, STRENGTHS, SWEEP, Job
from medctkit.findings import FINDINGS
from medctkit.lora.methods import METHODS
from medctkit.metrics.bootstrap import mean_of_findings, with_interval
from medctkit.zero_shot.prompts import PROMPTS

SAVED = Path(str(files("medctkit") / "assets" / "comparison"))
KEYS = ["group", "method", "rank", "studies", "learning_rate", "dialect", "variant"]
DIVERGED = ["group", "name", "method", "rank", "studies", "variant", "seed", "diverged"]
LABELS = {BASE: "base model"} | {name: method.label for name, method in (RIVALS | METHODS).items()}
KINDS = ("free", "same labels", "trained")  # no label of the target hospital; labels, but no gradient; both
EQUAL = 0.8  # of the way from the base model's validation score to LoRA's best: the score for `steps_to_equal`


@dataclass(frozen=True)
class Results:
    """What `medctkit compare` wrote: a row for each job, and seconds and memory of a step of each method, if measured.

    `diverged` has a row for each job, sweeps apart, whose training came to an end with something that is not finite.

    `draws` has for each run's name its mean AUROC on the test studies, then on each bootstrap resample of their
    patients; resample i is the same in all runs. Where tables need them, there are also "NAME/home", the same of the
    source hospital's test studies, "NAME/home calibration", "NAME/strength S" and "NAME/strength S/home", "NAME/flipped
    P", with P % of the test labels flipped, "NAME/findings", (1 + resamples, 18), and "NAME/held out/PROMPTS" and
    "NAME/seen/PROMPTS", over some findings.
    """

    runs: pd.DataFrame
    draws: dict[str, np.ndarray]
    costs: pd.DataFrame
    diverged: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=DIVERGED))

    def has(self, group: str) -> bool:
        """Whether a group has runs of its own, not only such as other groups share with it."""
        runs = self.runs[self.runs["group"] == group]
        own = {"rivals": runs["method"].isin(set(RIVALS) - {PROBE}), "noise": runs["variant"] != ""}
        own |= dict.fromkeys(("loss", "unseen", "forgetting"), own["noise"])
        own |= {"ranks": (runs["method"] == "lora") & (runs["rank"] != METHODS["lora"].rank)}
        own |= {"studies": (runs["method"] != BASE) & (runs["studies"] < runs["studies"].max())}
        return bool(own.get(group, runs["method"] != BASE).any())

    def mean_draws(self, names: Sequence[str], what: str = "") -> np.ndarray:
        """Draws (1 + resamples,) of some runs, their seeds averaged; NaN where they were not kept."""
        if any(name + what not in self.draws for name in names):
            return np.full_like(self.draws[names[0]], np.nan, dtype=float)
        return np.mean([self.draws[name + what].astype(float) for name in names], axis=0)


def load_results(folder: str | os.PathLike = SAVED) -> Results:
    """Read the results in a folder; those that come with the package by default."""
    folder = Path(folder).expanduser()
    for name in ("comparison.csv", "draws.npz"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}; `medctkit compare {folder}` makes it")
    with np.load(folder / "draws.npz", allow_pickle=False) as file:
        draws = {name: file[name] for name in file.files}
    runs = pd.read_csv(folder / "comparison.csv", dtype={"chosen": str, "variant": str})
    runs = runs.fillna({"dialect": "target", "variant": "", "chosen": "", "history": "[]"})
    columns = ["method", "seconds_per_step", "seconds_per_step_of_full", "peak_bytes", "peak_bytes_of_full"]
    costs, diverged = (
        pd.read_csv(path, dtype={"variant": str}) if path.is_file() else pd.DataFrame(columns=names)
        for path, names in ((folder / "costs.csv", columns), (folder / "diverged.csv", DIVERGED))
    )
    return Results(runs, draws, costs, diverged.fillna({"variant": ""}))


def _with_intervals(draws: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {key: end for name, each in draws.items() for key, end in with_interval(name, each).items()}


def base_of(results: Results) -> list[str]:
    """The name of the base model's run."""
    return [results.runs.loc[results.runs["method"] == BASE, "name"].iloc[0]]


def label_of(method: str, variant: str = "") -> str:
    """What a method, or a variant of it, is called: "LoRA, replay"."""
    return LABELS[method] + f", {variant}" * bool(variant)


def difference_of_means(
    results: Results, names: Sequence[str], others: Sequence[str], what: str = ""
) -> tuple[float, float, float]:
    """Mean AUROC of some runs minus that of others, with a 95 % interval over patients *and* seeds.

    Variance over resamples of patients, plus on each side that of the runs' means over seeds; Student's t with the
    degrees of freedom of Welch (Biometrika 34, 1947), where those of patients are many. One run alone has no variance
    over seeds: then the interval is of patients, for that run.
    """
    draws = results.mean_draws(names, what) - results.mean_draws(others, what)
    runs = [[float(results.draws[name + what][0]) for name in side] for side in (names, others)]
    over_seeds = [(np.var(side, ddof=1) / len(side), len(side) - 1) for side in runs if len(side) > 1]
    variance = np.var(draws[1:], ddof=1) + sum(of for of, _ in over_seeds)
    uncertain = sum(of**2 / freedom for of, freedom in over_seeds)
    half = stats.t.ppf(0.975, variance**2 / uncertain if uncertain else np.inf) * np.sqrt(variance)
    return draws[0], draws[0] - half, draws[0] + half


def pooled(results: Results, group: str) -> pd.DataFrame:
    """The runs of a group with their seeds put together.

    Returns:
        A row for each method, rank, number of studies and so on: `label`, `names` and `seeds` (how many) of its runs,
        `auroc` (mean over them) with `auroc_low` and `auroc_high`, `auroc_sd` over seeds, `over_base` (the difference
        to the base model) with its ends, `home`, `home_over_base` and `home_calibration_over_base`, the same at the
        source hospital, `steps_to_equal` (median over seeds of the first validated step with a score of `EQUAL`; NaN:
        most never had it), `stayed` (how many runs of a method that trains kept the base model, for no validated step
        was better), `trainable`, `adapter_bytes`, `validation_auroc`, calibration errors, `intruders`, and `at_edge`:
        the rate chosen is the lowest or highest of its sweep. 95 % intervals; see the module.

    Raises:
        ValueError: no run of that group.
    """
    runs = results.runs[results.runs["group"] == group]
    if runs.empty:
        there = ", ".join(sorted(results.runs["group"].unique()))
        raise ValueError(f"no runs of group {group!r}; there are {there}. medctkit compare FOLDER --only {group}")
    base, tuned = base_of(results), ["method", "rank", "dialect", "variant"]
    swept = results.runs[results.runs["group"] == SWEEP].fillna({"rank": 0}).groupby(tuned)["learning_rate"].agg(set)
    before = results.runs.set_index("name")["validation_auroc"].get(base[0], np.nan)
    ours = (runs["method"] == "lora") & (runs["rank"] == METHODS["lora"].rank) & (runs["variant"] == "")
    best = runs.loc[ours & (runs["studies"] == runs["studies"].max()), "validation_auroc"].mean()
    before = before.iloc[0] if isinstance(before, pd.Series) else before
    means = ["trainable", "adapter_bytes", "validation_auroc", "test_calibration_error", "home_calibration_error"]
    rows = []
    for key, same in runs.groupby(KEYS, dropna=False, sort=False):
        names = tuple(same["name"])
        row = dict(zip(KEYS, key, strict=True)) | {"seeds": len(same), "names": names, "chosen": same["chosen"].iloc[0]}
        row["label"] = label_of(row["method"], row["variant"])
        for what, name in (("", "auroc"), ("/home", "home"), ("/home calibration", "home_calibration")):
            of, was = (results.mean_draws(each, what) for each in (names, base))
            over, mirrored = "over_base" if name == "auroc" else f"{name}_over_base", "calibration" in what
            row |= with_interval(name, of, mirrored) | with_interval(over, of - was, mirrored)
        row["auroc_sd"] = np.std([results.draws[name][0] for name in names], ddof=1) if len(names) > 1 else np.nan
        reached = [
            next((step for step, score in json.loads(text) if score >= before + EQUAL * (best - before)), np.inf)
            for text in same["history"]
        ]
        row["stayed"] = same["best_step"].eq(0).sum() if row["method"] in METHODS else np.nan
        row["steps_to_equal"] = steps if np.isfinite(steps := np.median(reached)) else np.nan
        grid = METHODS[row["method"]].learning_rates if row["method"] in METHODS else ()
        kind = Job(SWEEP, row["method"], variant=row["variant"]).tuned.variant  # whose rate it has
        tried = swept.get((row["method"], np.nan_to_num(row["rank"]), row["dialect"], kind), grid)
        row["at_edge"] = bool(tried) and row["learning_rate"] in (min(tried), max(tried))
        rows.append(row | same.reindex(columns=[*means, "intruders"]).mean().to_dict())
    return pd.DataFrame(rows)


def _ordered(table: pd.DataFrame, order: Iterable[str]) -> pd.DataFrame:
    return table.sort_values("method", key=lambda names: names.map(list(order).index), kind="stable", ignore_index=True)


def method_table(results: Results, group: str = "methods") -> pd.DataFrame:
    """A row for each method, the base model first: what it scores on test studies, and what it costs."""
    table = pooled(results, group).merge(results.costs, on="method", how="left")
    table["any_prompt"] = table["method"] != PROBE
    table.loc[~table["method"].isin(METHODS), "dialect"] = "-"
    return _ordered(table, LABELS)


def rivals_table(results: Results) -> pd.DataFrame:
    """LoRA beside everything else that might do as well.

    Returns:
        `pooled`, a row for the base model, each free fix, each rival, LoRA in either encoder and in both, and full
        fine-tuning; and `kind` (one of `KINDS`), `labels` (what it does with labels of the target hospital:
        none, choose, learn), and `lora_over` with its ends (LoRA minus this, paired).
    """
    table = pooled(results, "rivals")
    table["labels"] = ["none" if m == BASE else RIVALS[m].labels if m in RIVALS else "learn" for m in table["method"]]
    table["kind"] = [
        KINDS[0] if labels == "none" else KINDS[1] if method in RIVALS else KINDS[2]
        for method, labels in zip(table["method"], table["labels"], strict=True)
    ]
    table["chosen"] = [
        f"{row.learning_rate:g}{'*' if row.at_edge else ''}, {row.dialect}" if row.method in METHODS else row.chosen
        for row in table.itertuples()
    ]
    ours = table.loc[table["method"] == "lora", "names"]
    lora = results.mean_draws(ours.iloc[0]) if len(ours) else np.nan
    against = [with_interval("lora_over", lora - results.mean_draws(names)) for names in table["names"]]
    return _ordered(pd.concat([table, pd.DataFrame(against)], axis=1), [BASE, *RIVALS, *METHODS])


def best_free(results: Results) -> pd.DataFrame:
    """The two free fixes that LoRA is held against: best on the test patients, which flatters it, and on validation.

    Returns:
        Rows of `rivals_table`, in this order; the same one twice where it is both, none if no fix was run.
    """
    table = rivals_table(results)
    free = table[(table["kind"] == KINDS[0]) & (table["method"] != BASE)]
    return free.loc[[free[score].idxmax() for score in ("auroc", "validation_auroc") if len(free)]]


def finding_table(results: Results) -> pd.DataFrame:
    """LoRA against logistic regression on HU in boxes, finding by finding and on average.

    Returns:
        Indexed by finding, the greatest lead of LoRA first, the mean last: `base`, `lora`, `boxes`, `lora_over` (LoRA
        minus boxes, paired), with their ends.
    """
    table = rivals_table(results).set_index("method")
    of = {}
    for name, method in (("base", BASE), ("lora", "lora"), ("boxes", "hu-boxes")):
        if method not in table.index:
            raise ValueError(f"no run of {method!r} in group 'rivals'. medctkit compare FOLDER --only rivals")
        each = results.mean_draws(table.loc[method, "names"], "/findings")
        of[name] = np.concatenate([each, mean_of_findings(each)[:, None]], axis=1)  # (1 + resamples, 19)
    of["lora_over"] = of["lora"] - of["boxes"]
    found = pd.DataFrame(_with_intervals(of), index=pd.Index([*FINDINGS, "mean"], name="finding"))
    return pd.concat([found[:-1].sort_values("lora_over", ascending=False), found[-1:]])


def names_of(results: Results, group: str, method: str, variant: str = "") -> tuple[str, ...]:
    """The runs of a method in a group; a ValueError if there is none yet."""
    runs = results.runs[results.runs["group"] == group]
    found = runs.loc[(runs["method"] == method) & (runs["variant"] == variant), "name"]
    if found.empty:
        run, lost = f"{method}, {variant}" if variant else method, results.diverged
        if n := ((lost["group"] == group) & (lost["method"] == method) & (lost["variant"] == variant)).sum():
            raise ValueError(f"group {group!r} has no run of {run!r}: all {n} diverged")
        raise ValueError(f"group {group!r} has no run of {run!r} yet. medctkit compare FOLDER --only {group}")
    return tuple(found)


def unseen_table(results: Results) -> pd.DataFrame:
    """What LoRA does to findings that no loss of it ever saw, beside those that it was taught, in all sets of prompts.

    Returns:
        A row for each of "held out" (the mean of `HELD_OUT`) and "seen" (of the other findings), and each set of
        prompts: `base`, `adapted` (LoRA without the held-out findings), `gain` between them, and `taught` (LoRA
        with all findings) and `taught_gain`, with their ends.
    """
    of_run = {"base": (BASE,), "adapted": ("lora", "unseen"), "taught": ("lora",)}
    names = {what: names_of(results, "unseen", *run) for what, run in of_run.items()}
    rows = []
    for findings in ("held out", "seen"):
        for prompts in PROMPTS:
            of = {what: results.mean_draws(each, f"/{findings}/{prompts}") for what, each in names.items()}
            of |= {"gain": of["adapted"] - of["base"], "taught_gain": of["taught"] - of["base"]}
            rows.append({"findings": findings, "prompts": prompts} | _with_intervals(of))
    return pd.DataFrame(rows)


def forgetting_table(results: Results) -> pd.DataFrame:
    """Rows of `pooled` for all that trains the model, remedies among them: gain at the target, and loss at home."""
    there = [pooled(results, group) for group in ("forgetting", "rivals", "placement", "methods") if results.has(group)]
    table = pd.concat(there).drop_duplicates(["method", "variant"])
    return _ordered(table[table["home_over_base"].notna() & table["method"].isin(METHODS)], METHODS)


def strength_table(results: Results) -> pd.DataFrame:
    """LoRA and full fine-tuning at other strengths, averages of their weights and the base model's among them.

    Returns:
        A row for each of both and each strength from 0 to 1.5: `auroc`, `over_base`, `home_over_base`, with their ends.
    """
    base, rows = base_of(results), []
    for method in ("lora", "full"):
        for strength in sorted({0.0, 1.0, *STRENGTHS}):
            names = names_of(results, "forgetting", method) if strength else base
            what = "" if strength in (0, 1) else f"/strength {strength:g}"
            of, home = results.mean_draws(names, what), results.mean_draws(names, f"{what}/home")
            row: dict[str, Any] = {"method": method, "label": LABELS[method], "strength": strength}
            over, home_over = of - results.mean_draws(base), home - results.mean_draws(base, "/home")
            rows.append(row | _with_intervals({"auroc": of, "over_base": over, "home_over_base": home_over}))
    return pd.DataFrame(rows)


def noise_table(results: Results) -> pd.DataFrame:
    """What wrong labels do to training, and what they do to the measured AUROC.

    Returns:
        A row for each share of flipped labels in percent, `flipped`: `trained`, LoRA that learnt from them, scored on
        right ones, and `lost`, the difference to LoRA that learnt from right ones; `measured_base`, `measured` and
        `measured_gain`, the base model and that LoRA scored on flipped labels; with their ends.
    """
    rows, base, right = [], base_of(results), names_of(results, "noise", "lora")
    for percent in (0, 5, 10, 20):
        names = names_of(results, "noise", "lora", f"noise-{percent}") if percent else right
        what = f"/flipped {percent}" if percent else ""
        of = {"trained": results.mean_draws(names), "measured_base": results.mean_draws(base, what)}
        of |= {"lost": of["trained"] - results.mean_draws(right), "measured": results.mean_draws(right, what)}
        of["measured_gain"] = of["measured"] - of["measured_base"]
        rows.append({"flipped": percent} | _with_intervals(of))
    return pd.DataFrame(rows)
