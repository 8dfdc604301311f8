"""Figures of the reproduction report, each from a `Measurement`: such as one could put into a paper.

Colours are told apart by colour-blind people (Okabe and Ito); base is blue, adapted orange everywhere.
"""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve

from medctkit.experiments.clinical import GRID
from medctkit.experiments.measure import Measurement
from medctkit.findings import FINDINGS
from medctkit.metrics.bootstrap import BINS, error_bars

COLOURS = {"base": "#0072B2", "adapted": "#D55E00"}
DIFFERENCE = "#009E73"


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def forest(measured: Measurement) -> Figure:
    """AUROC of base and adapted model with intervals, and their paired difference; largest gain on top."""
    difference = measured.difference
    order = [*difference.drop(index="mean")["auroc"].sort_values(na_position="first").index, "mean"]
    figure = _figure(12, 1.8 + 0.3 * len(order))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    places = np.arange(len(order))
    for (name, colour), shift in zip(COLOURS.items(), (0.15, -0.15), strict=True):
        table, at = measured.tables[name].loc[order], places + shift
        left.errorbar(table["auroc"], at, xerr=error_bars(table), fmt="o", color=colour, ms=5, lw=1.2, label=name)
    left.axvline(0.5, color="grey", ls=":", label="chance")
    positives = measured.tables["base"].loc[order, "positives"]
    names = [f"{name} ({positives[name]})" if name != "mean" else "mean of findings" for name in order]
    left.set(yticks=places, yticklabels=names, xlabel="AUROC, 95 % interval", title="test patients (positive studies)")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    table = difference.loc[order]
    right.errorbar(table["auroc"], places, xerr=error_bars(table), fmt="s", color=DIFFERENCE, ms=5, lw=1.2)
    right.axvline(0, color="grey", ls=":")
    right.set(xlabel="adapted minus base, 95 % interval", title="paired difference in AUROC")
    for axes in (left, right):
        axes.axhspan(len(order) - 1.5, len(order) - 0.5, color="0.93", zorder=0)
        axes.grid(axis="x", alpha=0.25)
    return figure


def _panels(x: str, y: str) -> tuple[Figure, list[Axes]]:
    """A panel for each finding."""
    columns = min(6, len(FINDINGS))
    rows = -(-len(FINDINGS) // columns)
    figure = _figure(max(6.5, 13 * columns / 6), 1.5 + 2 * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    panels = list(grid.flat)[: len(FINDINGS)]
    for axes, finding in zip(panels, FINDINGS, strict=True):
        axes.set_title(finding, fontsize=8.5)
    for axes in panels[-columns:]:
        axes.tick_params(labelbottom=True)
    for axes in list(grid.flat)[len(FINDINGS) :]:
        axes.remove()
    figure.supxlabel(x)
    figure.supylabel(y)
    return figure, panels


def roc_curves(measured: Measurement) -> Figure:
    """ROC curves of both models, one panel for each finding, with the AUROC of each."""
    figure, panels = _panels("1 - specificity", "sensitivity")
    for k, (axes, finding) in enumerate(zip(panels, FINDINGS, strict=True)):
        axes.plot([0, 1], [0, 1], color="grey", ls=":", lw=1)
        known = ~np.isnan(measured.labels[:, k])
        labels = measured.labels[known, k]
        if len(np.unique(labels)) < 2:
            axes.text(0.5, 0.5, "one class only", ha="center")
        else:
            for (name, colour), place in zip(COLOURS.items(), (0.15, 0.05), strict=True):
                false, true, _ = roc_curve(labels, measured.scores[name][known, k])
                axes.plot(false, true, color=colour, lw=1.4, label=name)
                value = measured.tables[name].loc[finding, "auroc"]
                axes.text(0.97, place, f"{value:.2f}", color=colour, ha="right", fontsize=9)
        axes.set_aspect("equal")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    return figure


def calibration(measured: Measurement) -> Figure:
    """Observed share of positive studies against predicted probability, and how often each is predicted."""
    fewest = 20  # scores of a bin: fewer say little
    figure = _figure(8, 6)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    top.plot([0, 1], [0, 1], color="grey", ls=":", label="perfectly calibrated")
    known = ~np.isnan(measured.labels)
    edges = np.linspace(0, 1, BINS + 1)
    for name, colour in COLOURS.items():
        scores, labels = measured.scores[name][known], measured.labels[known]
        place = np.digitize(scores, edges[1:-1])
        counts = np.bincount(place, minlength=BINS)
        full = counts >= fewest
        predicted, observed = (np.bincount(place, x, BINS)[full] / counts[full] for x in (scores, labels))
        label = f"{name} (mean calibration error {measured.tables[name].loc['mean', 'calibration_error']:.2f})"
        top.plot(predicted, observed, "o-", color=colour, label=label)
        bottom.stairs(counts, edges, color=colour, fill=name == "base", alpha=0.5 if name == "base" else 1.0, lw=1.5)
    title = f"calibration, all findings together (bins of {fewest} and more)"
    top.set(ylabel="observed share positive", title=title, ylim=(0, 1))
    top.legend(frameon=False)
    bottom.set(xlabel="predicted probability", ylabel="scores", xlim=(0, 1))
    return figure


def decision_curves(measured: Measurement) -> Figure:
    """Net benefit of acting as each model says, on everybody and on nobody, one panel for each finding."""
    assert measured.clinical is not None
    figure, panels = _panels("probability from which one acts", "net benefit")
    for k, axes in enumerate(panels):
        for name, curve in measured.clinical.curves.items():
            axes.plot(GRID, curve[:, k], color=COLOURS.get(name, "0.6"), lw=1.4, label=name)
        axes.axhline(0, color="black", ls=":", lw=1, label="nobody")
        axes.set_ylim(bottom=-0.05)  # acting on everybody falls far below
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=4, frameon=False)
    return figure


def prompt_sensitivity(measured: Measurement) -> Figure:
    """Mean AUROC of both models with each set of prompts."""
    sets = list(dict.fromkeys(measured.prompts["set"]))
    figure = _figure(8, 1.2 + 0.7 * len(sets))
    axes = figure.subplots()
    for (name, colour), shift in zip(COLOURS.items(), (-0.1, 0.1), strict=True):
        rows = measured.prompts[measured.prompts["model"] == name].set_index("set").loc[sets]
        places = np.arange(len(sets)) + shift
        axes.errorbar(rows["auroc"], places, xerr=error_bars(rows), fmt="o", color=colour, lw=1.2, label=name)
    axes.set(yticks=range(len(sets)), yticklabels=sets, xlabel="mean AUROC, 95 % interval", ylabel="prompts")
    axes.set_title("the same images, asked in other words")
    axes.margins(y=0.3)
    axes.grid(axis="x", alpha=0.25)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


def score_histograms(measured: Measurement) -> Figure:
    """Scores of the adapted model for studies with and without each finding, and the threshold from validation."""
    figure, panels = _panels("probability given by the adapted model", "share of studies")
    table, scores, edges = measured.tables["adapted"], measured.scores["adapted"], np.linspace(0, 1, 26)
    for k, (axes, finding) in enumerate(zip(panels, FINDINGS, strict=True)):
        for value, colour, label in ((0, "0.45", "without the finding"), (1, COLOURS["adapted"], "with it")):
            chosen = scores[measured.labels[:, k] == value, k]
            if len(chosen):
                counts = np.histogram(chosen, edges)[0] / len(chosen)
                axes.stairs(counts, edges, color=colour, fill=value == 0, alpha=0.45 if value == 0 else 1, label=label)
        axes.axvline(table.loc[finding, "threshold"], color="black", ls="--", lw=1, label="threshold (validation)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=3, frameon=False)
    return figure
