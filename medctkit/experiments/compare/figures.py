"""The figures of a comparison."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medctkit.common.atomic import replacing
from medctkit.experiments.compare.results import KINDS, TEXTS, Results, method_table, pooled, rivals_table
from medctkit.experiments.compare.runs import BASE, PROBE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
_COLOURS = dict(zip(KINDS, ("#E69F00", "#009E73", "#0072B2"), strict=True))


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
        colour, marker = MARKS.get(row.method, ("#999999", "h"))
        ends = [[row.auroc - row.auroc_low], [row.auroc_high - row.auroc]]
        label = f"{row.label}, {row.auroc:.3f}" + ("" if row.any_prompt else " (18 answers only)")
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
            label = TEXTS[name][0] + (" (18 answers only)" if name == PROBE else "")
            axes.plot(rows["studies"], rows["auroc"], marker=marker, color=colour, label=label)
            band: dict[str, Any] = {"color": colour, "alpha": 0.15, "linewidth": 0}
            axes.fill_between(rows["studies"], rows["auroc_low"], rows["auroc_high"], **band)
    sizes = sorted(table["studies"].unique())
    axes.set_xticks(sizes, [f"{n:,.0f}" for n in sizes])
    axes.minorticks_off()
    axes.set_xlabel("training studies (band: 95 % interval over test patients, of the mean over seeds)")
    axes.legend(loc="upper left", frameon=False, fontsize=9)
    return figure


def figure_rivals(results: Results) -> Figure:
    """AUROC with its interval, a line for everything that LoRA is held against: free, same labels, trained."""
    import matplotlib.pyplot as plt

    table = rivals_table(results)
    base = table.loc[table["method"] == BASE, "auroc"].iloc[0]
    table = table[table["method"] != BASE].sort_values("kind", key=lambda kinds: kinds.map(KINDS.index), kind="stable")
    figure, axes = plt.subplots(figsize=(9, 0.4 * len(table) + 1.5), layout="constrained")
    axes.axvline(base, color=MARKS[BASE][0], linestyle="--", linewidth=1.2, label=f"base model, {base:.3f}")
    for kind in KINDS:
        rows = table[table["kind"] == kind]
        if len(rows):
            ends = [rows["auroc"] - rows["auroc_low"], rows["auroc_high"] - rows["auroc"]]
            places = [list(table.index).index(i) for i in rows.index]
            axes.errorbar(rows["auroc"], places, xerr=ends, fmt="o", capsize=3, color=_COLOURS[kind], label=kind)
    names = [f"{row.label}  {row.auroc:.3f}" for row in table.itertuples()]
    axes.set_yticks(range(len(table)), names)
    axes.invert_yaxis()
    axes.set_xlabel("mean test AUROC of 18 findings, 95 % interval over patients")
    axes.set_title("Phantom studies: what else would do", fontsize=11)
    axes.grid(alpha=0.25, axis="x")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def figure_forgetting(results: Results) -> Figure:
    """Gain at the target hospital against what is lost at the source hospital, for each method that trains."""
    import matplotlib.pyplot as plt
    import pandas as pd

    there = [pooled(results, group) for group in ("methods", "rivals") if results.has(group)]
    table = pd.concat(there).drop_duplicates("method")
    table = table[table["home_over_base"].notna() & (table["method"] != BASE)]
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for line in (axes.axhline, axes.axvline):  # where nothing changes
        line(0, color=MARKS[BASE][0], linewidth=0.8, linestyle=":")
    for row in table.itertuples():
        colour, marker = MARKS.get(row.method, ("#999999", "h"))
        x, y = (
            [[getattr(row, name) - getattr(row, f"{name}_low")], [getattr(row, f"{name}_high") - getattr(row, name)]]
            for name in ("home_over_base", "over_base")
        )
        label = f"{TEXTS[row.method][0]}, {row.over_base:+.3f} / {row.home_over_base:+.3f}"
        style: dict[str, Any] = {"color": colour, "marker": marker, "capsize": 2, "linewidth": 1, "label": label}
        axes.errorbar(row.home_over_base, row.over_base, y, x, **style)
    axes.set_xlabel("mean AUROC at the source hospital, over the base model")
    axes.set_ylabel("mean AUROC at the target hospital, over the base model")
    axes.set_title("Phantom studies: gain at the target against loss at home", fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, title="target / home", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


FIGURES = {  # name of the file: the group whose runs it needs, what draws it
    "methods": ("methods", figure_methods),
    "studies": ("studies", figure_studies),
    "rivals": ("rivals", figure_rivals),
    "forgetting": ("rivals", figure_forgetting),
}


def write_figures(results: Results, folder: str | os.PathLike) -> list[Path]:
    """Write those figures as PNG whose runs are there; returns their paths."""
    import matplotlib.pyplot as plt

    written = []
    for name, (group, draw) in FIGURES.items():
        if results.has(group):
            figure, path = draw(results), Path(folder) / f"{name}.png"
            with replacing(path) as temporary:
                figure.savefig(temporary, format="png", dpi=120)
            plt.close(figure)
            written.append(path)
    return written
