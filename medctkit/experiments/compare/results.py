"""What a comparison found: its files read, seeds pooled, a table for the methods, and two figures.

An interval of a mean over seeds is a bootstrap over test patients: in each resample all seeds are scored on the same
patients, and their mean AUROCs averaged. It says how sure we are for these trained models on other patients; how much
another seed would change is `auroc_sd`, beside it. Differences to the base model are taken within each resample.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medctkit.common.atomic import replacing
from medctkit.experiments.compare.rivals import RIVALS
from medctkit.experiments.compare.runs import BASE, PROBE
from medctkit.lora.methods import METHODS
from medctkit.metrics.bootstrap import interval

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SAVED = Path(str(files("medctkit") / "assets" / "comparison"))
KEYS = ["group", "method", "rank", "studies", "learning_rate"]
TEXTS = {  # label, what it trains, paper
    BASE: ("base model", "Nothing: the base model as it is, zero-shot.", ""),
}
TEXTS |= {name: (rival.label, rival.does, rival.source) for name, rival in RIVALS.items()}
TEXTS |= {name: (method.label, method.trains, method.paper) for name, method in METHODS.items()}
MARKS = {  # colours of Okabe and Ito, which the colour-blind can tell apart; where one comes twice, another marker
    BASE: ("#555555", ""),
    PROBE: ("#009E73", "s"),
    "full": ("#D55E00", "^"),
    "bitfit": ("#000000", "v"),
    "lora": ("#0072B2", "o"),
    "lora-vision": ("#56B4E9", "<"),
    "lora-text": ("#E69F00", ">"),
    "dora": ("#CC79A7", "D"),
    "rslora": ("#000000", "P"),
    "vera": ("#D55E00", "X"),
    "ia3": ("#009E73", "*"),
}


@dataclass(frozen=True)
class Results:
    """What `medctkit compare` wrote: a row for each job, and seconds and memory of a step of each method, if measured.

    `draws` has for each run's name its mean AUROC on the test studies, then on each bootstrap resample of their
    patients; resample i is the same in all runs.
    """

    runs: pd.DataFrame
    draws: dict[str, np.ndarray]
    costs: pd.DataFrame


def load_results(folder: str | os.PathLike = SAVED) -> Results:
    """Read the results in a folder; those that come with the package by default."""
    import pandas as pd

    folder = Path(folder)
    for name in ("comparison.csv", "draws.npz"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}; `medctkit compare {folder}` makes it")
    with np.load(folder / "draws.npz", allow_pickle=False) as file:
        draws = {name: file[name] for name in file.files}
    costs = folder / "costs.csv"
    columns = ["method", "seconds_per_step", "seconds_per_step_of_full", "peak_bytes", "peak_bytes_of_full"]
    return Results(
        pd.read_csv(folder / "comparison.csv"),
        draws,
        pd.read_csv(costs) if costs.is_file() else pd.DataFrame(columns=columns),
    )


def pooled(results: Results, group: str) -> pd.DataFrame:
    """The runs of a group with their seeds put together.

    Returns:
        A row for each method, rank, number of studies and learning rate: `seeds` (how many), `auroc` (mean over
        them) with `auroc_low` and `auroc_high`, `auroc_sd` over seeds, `over_base` (the difference to the base model)
        with its ends, `trainable`, `adapter_bytes`, `validation_auroc`. 95 % intervals; see the module.

    Raises:
        ValueError: no run of that group.
    """
    import pandas as pd

    runs = results.runs[results.runs["group"] == group]
    if runs.empty:
        there = ", ".join(sorted(results.runs["group"].unique()))
        raise ValueError(f"no runs of group {group!r}; there are {there}. medctkit compare FOLDER --only {group}")
    base = results.draws[results.runs.loc[results.runs["method"] == BASE, "name"].iloc[0]]
    rows = []
    for key, same in runs.groupby(KEYS, dropna=False, sort=False):
        each = np.stack([results.draws[name] for name in same["name"]]).astype(float)  # (seeds, 1 + resamples)
        row = dict(zip(KEYS, key, strict=True)) | {"seeds": len(same)}
        for name, values in (("auroc", each.mean(0)), ("over_base", each.mean(0) - base)):
            low, high = interval(values)
            row |= {name: values[0], f"{name}_low": low, f"{name}_high": high}
        row["auroc_sd"] = each[:, 0].std(ddof=1) if len(each) > 1 else np.nan
        rows.append(row | same[["trainable", "adapter_bytes", "validation_auroc"]].mean().to_dict())
    return pd.DataFrame(rows)


def method_table(results: Results) -> pd.DataFrame:
    """A row for each method, the base model first: what it trains, what it scores on test studies, what it costs."""
    table = pooled(results, "methods").merge(results.costs, on="method", how="left")
    for i, column in enumerate(("label", "trains", "paper")):
        table[column] = [TEXTS[name][i] for name in table["method"]]
    table["zero_shot"] = table["method"] != PROBE
    full = table.loc[table["method"] == "full", "trainable"]
    table["trainable_share"] = table["trainable"] / (full.iloc[0] if len(full) else np.nan)
    return table.sort_values("method", key=lambda names: names.map(list(TEXTS).index), ignore_index=True)


def show(table: pd.DataFrame) -> str:
    """`method_table` as text for a terminal."""
    import pandas as pd

    shown = pd.DataFrame({"method": table["label"].where(table["zero_shot"], table["label"] + " (not zero-shot)")})
    shown["test AUROC"] = [f"{r.auroc:.3f} [{r.auroc_low:.3f}, {r.auroc_high:.3f}]" for r in table.itertuples()]
    shown["over base"] = [
        "-" if r.method == BASE else f"{r.over_base:+.3f} [{r.over_base_low:+.3f}, {r.over_base_high:+.3f}]"
        for r in table.itertuples()
    ]
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
        values = table[column] / 1e6 if column == "peak_bytes" else table[column]
        shown[name] = values.map(form.format).where(values.notna(), "-")
    note = "Mean AUROC over findings and seeds; 95 % intervals: bootstrap over test patients. Phantom data."
    return f"{shown.to_string(index=False)}\n{note}"


# --- figures --------------------------------------------------------------------------------------------


def _axes(results: Results, title: str) -> tuple[Figure, Axes]:
    """A figure with the base model as a dashed line."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    base = results.draws[results.runs.loc[results.runs["method"] == BASE, "name"].iloc[0]][0]
    axes.axhline(base, color=MARKS[BASE][0], linestyle="--", linewidth=1.2, label=f"base model, {base:.3f}")
    axes.set_xscale("log")
    axes.set_ylabel("mean test AUROC of 18 findings")
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def figure_methods(results: Results) -> Figure:
    """AUROC with its interval against the number of trainable parameters; ranks of LoRA are joined by a line."""
    table = method_table(results)
    table = table[table["method"] != BASE].sort_values("trainable", kind="stable")
    figure, axes = _axes(results, "Phantom studies: what each way to fine-tune reaches, and what it trains")
    if (results.runs["group"] == "ranks").any():
        ranks = pooled(results, "ranks").sort_values("rank")
        line: dict[str, Any] = {"color": MARKS["lora"][0], "linewidth": 0}
        axes.plot(ranks["trainable"], ranks["auroc"], ".-", zorder=2, **line | {"linewidth": 1})
        axes.fill_between(ranks["trainable"], ranks["auroc_low"], ranks["auroc_high"], alpha=0.1, **line)
        for row in ranks.itertuples():
            place: dict[str, Any] = {"xytext": (0, -10), "textcoords": "offset points", "ha": "center", "fontsize": 8}
            axes.annotate(f"r={row.rank:.0f}", (row.trainable, row.auroc_low), color=MARKS["lora"][0], **place)
    x = 0.0
    for row in table.itertuples():
        x = max(row.trainable, 1.2 * x)  # side by side, where methods train (nearly) as much
        colour, marker = MARKS[row.method]
        ends = [[row.auroc - row.auroc_low], [row.auroc_high - row.auroc]]
        label = f"{row.label}, {row.auroc:.3f}" + ("" if row.zero_shot else " (not zero-shot)")
        axes.errorbar(x, row.auroc, ends, color=colour, capsize=2, linewidth=1.2, zorder=3, marker=marker, label=label)
    axes.margins(x=0.08, y=0.12)
    axes.set_xlabel("trainable parameters (moved aside a little where they coincide)")
    aside: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
    axes.legend(frameon=False, fontsize=9, title="mean AUROC, 95 % interval", **aside)
    return figure


def figure_studies(results: Results) -> Figure:
    """AUROC against the number of training studies, a line and a band for each method."""
    table = pooled(results, "studies").sort_values("studies")
    figure, axes = _axes(results, "Phantom studies: how AUROC grows with the number of training studies")
    for name in ("lora", "full", PROBE):
        rows, (colour, marker) = table[table["method"] == name], MARKS[name]
        if len(rows):
            label = TEXTS[name][0] + (" (not zero-shot)" if name == PROBE else "")
            axes.plot(rows["studies"], rows["auroc"], marker=marker, color=colour, label=label)
            band: dict[str, Any] = {"color": colour, "alpha": 0.15, "linewidth": 0}
            axes.fill_between(rows["studies"], rows["auroc_low"], rows["auroc_high"], **band)
    sizes = sorted(table["studies"].unique())
    axes.set_xticks(sizes, [f"{n:,.0f}" for n in sizes])
    axes.minorticks_off()
    axes.set_xlabel("training studies (band: 95 % interval over test patients, of the mean over seeds)")
    axes.legend(loc="upper left", frameon=False, fontsize=9)
    return figure


def write_figures(results: Results, folder: str | os.PathLike) -> list[Path]:
    """Write those figures as PNG whose runs are there; returns their paths."""
    import matplotlib.pyplot as plt

    written = []
    for name, group, draw in (("methods", "methods", figure_methods), ("studies", "studies", figure_studies)):
        if len(results.runs[(results.runs["group"] == group) & (results.runs["method"] != BASE)]):
            figure, path = draw(results), Path(folder) / f"{name}.png"
            with replacing(path) as temporary:
                figure.savefig(temporary, format="png", dpi=120)
            plt.close(figure)
            written.append(path)
    return written
