"""The figures of a comparison."""

import os
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from medctkit.common.atomic import replacing
from medctkit.experiments.compare.results import (
    KINDS,
    LABELS,
    Results,
    base_of,
    forgetting_table,
    method_table,
    pooled,
    rivals_table,
    strength_table,
)
from medctkit.experiments.compare.runs import BASE, PROBE
from medctkit.findings import FINDINGS
from medctkit.lora.methods import METHODS
from medctkit.metrics.bootstrap import error_bars

AUROC = f"mean test AUROC of {len(FINDINGS)} findings"
_ONLY = f" ({len(FINDINGS)} answers only)"
# A colour and a marker for each: those of Okabe and Ito, which the colour-blind can tell apart, then of Paul Tol
_COLOURS = "0072B2 D55E00 009E73 E69F00 56B4E9 CC79A7 000000".split()
_COLOURS += "882255 332288 999933 44AA99 661100 117733 AA4499 DDCC77 888888".split()
_FIRST = ("lora", "full", PROBE, "lora-vision", "lora-text", "dora", "bitfit", "hu-boxes")
_NAMES = [*_FIRST, *(name for name in METHODS if name not in _FIRST)]
MARKS = {BASE: ("#555555", "")}
MARKS |= {name: (f"#{of}", mark) for name, of, mark in zip(_NAMES, _COLOURS, "o^s<>DvPX*hdp8H1", strict=True)}


def _axes(title: str, x: str, y: str, size: tuple[float, float] = (9, 5)) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    axes.set(title=f"Phantom studies: {title}", xlabel=x, ylabel=y)
    axes.title.set_fontsize(11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _base_line(results: Results, axes: Axes, draw: str = "axhline") -> None:
    base = results.mean_draws(base_of(results))[0]
    getattr(axes, draw)(base, color=MARKS[BASE][0], linestyle="--", linewidth=1.2, label=f"{LABELS[BASE]}, {base:.3f}")


def _legend(axes: Axes, title: str) -> None:
    axes.legend(frameon=False, fontsize=9, title=title, loc="center left", bbox_to_anchor=(1, 0.5))


def _band(axes: Axes, table: pd.DataFrame, x: str, colour: str, **line: Any) -> None:
    axes.plot(table[x], table["auroc"], color=colour, **line)
    axes.fill_between(table[x], table["auroc_low"], table["auroc_high"], color=colour, alpha=0.1, linewidth=0)


def figure_methods(results: Results) -> Figure:
    """AUROC with its interval against the number of trainable parameters; ranks of LoRA are joined by a line."""
    table = pd.concat([method_table(results, group) for group in ("methods", "placement") if results.has(group)])
    table = table[table["method"] != BASE].drop_duplicates("method").sort_values("trainable", kind="stable")
    what = "what each way to fine-tune reaches, and what it trains"
    figure, axes = _axes(what, "trainable parameters (moved aside a little where they coincide)", AUROC)
    axes.set_xscale("log")
    _base_line(results, axes)
    if results.has("ranks"):
        ranks = pooled(results, "ranks").dropna(subset="rank").sort_values("rank")
        _band(axes, ranks, "trainable", MARKS["lora"][0], marker=".", zorder=2, linewidth=1)
        for row in ranks.itertuples():
            place: dict[str, Any] = {"xytext": (0, -10), "textcoords": "offset points", "ha": "center", "fontsize": 8}
            axes.annotate(f"r={row.rank:.0f}", (row.trainable, row.auroc_low), color=MARKS["lora"][0], **place)
    x = 0.0
    for row in table.itertuples():
        x = max(row.trainable, 1.2 * x)  # side by side, where methods train (nearly) as much
        colour, marker = MARKS[row.method]
        label = f"{row.label}, {row.auroc:.3f}" + ("" if row.any_prompt else _ONLY)
        style: dict[str, Any] = {"color": colour, "marker": marker, "label": label, "capsize": 2, "zorder": 3}
        axes.errorbar(x, row.auroc, error_bars(row), **style)
    axes.margins(x=0.08, y=0.12)
    _legend(axes, "mean AUROC, 95 % interval")
    return figure


def figure_studies(results: Results) -> Figure:
    """AUROC against the number of training studies, a line and a band for each method."""
    table = pooled(results, "studies").sort_values("studies")
    x_label = "training studies (band: 95 % interval over test patients, of the mean over seeds)"
    title = "how AUROC grows with the number of training studies"
    figure, axes = _axes(title, x_label, AUROC)
    axes.set_xscale("log")
    _base_line(results, axes)
    for name in ("lora", "full", PROBE, "hu-boxes"):
        rows, (colour, marker) = table[table["method"] == name], MARKS[name]
        label = LABELS[name] + _ONLY * (name in (PROBE, "hu-boxes"))
        if len(rows):
            _band(axes, rows, "studies", colour, marker=marker, label=label)
    sizes = sorted(set(table["studies"]) - {0})
    # numbers of neighbours would overlap
    named = [n for n, after in zip(sizes, [*sizes[1:], 2 * sizes[-1]], strict=True) if after > 1.5 * n]
    axes.set_xticks(named, [f"{n:,.0f}" for n in named])
    axes.minorticks_off()
    axes.legend(loc="upper left", frameon=False, fontsize=9)
    return figure


def figure_rivals(results: Results) -> Figure:
    """AUROC with its interval, a line for everything that LoRA is held against: free, same labels, trained."""
    table = rivals_table(results)
    table = table[table["method"] != BASE].sort_values("kind", key=lambda kinds: kinds.map(KINDS.index), kind="stable")
    label = f"{AUROC}, 95 % interval over patients"
    figure, axes = _axes("what else would do", label, "", (9, 0.4 * len(table) + 1.5))
    _base_line(results, axes, "axvline")
    for kind, colour in zip(KINDS, ("#E69F00", "#009E73", "#0072B2"), strict=True):
        rows = table[table["kind"] == kind]
        if len(rows):
            places = [list(table.index).index(i) for i in rows.index]
            bars: dict[str, Any] = {"xerr": error_bars(rows), "fmt": "o", "capsize": 3}
            axes.errorbar(rows["auroc"], places, **bars, color=colour, label=kind)
    axes.set_yticks(range(len(table)), [f"{row.label}  {row.auroc:.3f}" for row in table.itertuples()])
    axes.invert_yaxis()
    _legend(axes, "")
    return figure


def figure_forgetting(results: Results) -> Figure:
    """Gain at the target hospital against what is lost at the source hospital; lines join the strengths of a method."""
    title, where = "gain at the target against loss at home", "mean AUROC at the {} hospital, over the base model"
    figure, axes = _axes(title, where.format("source"), where.format("target"))
    for line in (axes.axhline, axes.axvline):  # where nothing changes
        line(0, color=MARKS[BASE][0], linewidth=0.8, linestyle=":")
    for row in forgetting_table(results).itertuples():
        colour, marker = MARKS[row.method]
        label = f"{row.label}, {row.over_base:+.3f} / {row.home_over_base:+.3f}"
        style: dict[str, Any] = {"color": colour, "marker": marker, "capsize": 2, "linewidth": 1, "label": label}
        style |= {"fillstyle": "none"} if row.variant else {}
        style |= {"xerr": error_bars(row, "home_over_base"), "yerr": error_bars(row, "over_base")}
        axes.errorbar(row.home_over_base, row.over_base, **style)
    if results.has("forgetting"):
        for method, rows in strength_table(results).groupby("method"):
            axes.plot(rows["home_over_base"], rows["over_base"], ".-", color=MARKS[method][0], linewidth=1, zorder=1)
    _legend(axes, "target / home")
    return figure


FIGURES = {  # group whose runs it needs, and name of the file: what draws it
    "methods": figure_methods,
    "studies": figure_studies,
    "rivals": figure_rivals,
    "forgetting": figure_forgetting,
}


def write_figures(results: Results, folder: str | os.PathLike) -> list[Path]:
    """Write those figures as PNG whose runs are there; returns their paths."""
    written = []
    for name, draw in FIGURES.items():
        if results.has(name):
            figure, path = draw(results), Path(folder) / f"{name}.png"
            with replacing(path) as temporary:
                figure.savefig(temporary, format="png", dpi=120)
            plt.close(figure)
            written.append(path)
    return written
