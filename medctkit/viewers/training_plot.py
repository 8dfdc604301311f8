"""A fine-tuning run as a picture, drawn anew in a notebook while the model trains."""

import io
import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
from IPython import get_ipython
from IPython.display import Image, display
from matplotlib.figure import Figure


def training_figure(history: pd.DataFrame, batch_size: int | None = None) -> Figure:
    """Losses and validation AUROC over the steps of a fine-tuning run.

    Args:
        history: as `FineTuneResult` has it: step, contrastive, prompts, score; loss columns may be missing.
        batch_size: draws the contrastive loss of pure guessing, ln(batch_size), too.
    """
    figure = Figure(figsize=(12, 4), layout="tight")
    left, right = figure.subplots(1, 2)
    for name, colour in (("contrastive", "#0072B2"), ("prompts", "#D55E00")):
        if name in history:
            left.plot(history["step"], history[name].rolling(10, min_periods=1).mean(), color=colour, label=name)
    if "contrastive" in history and batch_size:
        left.axhline(math.log(batch_size), color="#0072B2", ls=":", label=f"guessing, ln {batch_size}")
    left.set(xlabel="step", ylabel="loss (mean of 10 steps)", title="training loss")
    if left.lines:
        left.legend()
    scored = history.dropna(subset=["score"])
    best = scored.loc[scored["score"].idxmax()]
    right.plot(scored["step"], scored["score"], "o-", color="#009E73", label="mean AUROC, by prompts")
    right.axvline(best["step"], color="grey", ls="--", label=f"best so far: {best['score']:.3f}")
    right.set(xlabel="step", ylabel="mean AUROC, by prompts", title="validation patients")
    right.legend()
    return figure


class TrainingPlot:
    """Losses and validation AUROC, drawn anew in a notebook after each validation: the `callback` of `finetune`.

    Outside a notebook it only collects the rows; `training_figure(plot.history)` draws them.
    """

    def __init__(self, batch_size: int | None = None):
        self.batch_size = batch_size
        self.rows: list[dict[str, float]] = []
        self._shown: Any = None

    @property
    def history(self) -> pd.DataFrame:
        """The rows so far."""
        return pd.DataFrame(self.rows)

    def __call__(self, row: Mapping[str, float]) -> None:
        """Take a row; draw if it has a score."""
        self.rows.append(dict(row))
        if "score" in row and get_ipython() is not None:
            self._draw()

    def _draw(self) -> None:
        buffer = io.BytesIO()
        training_figure(self.history, self.batch_size).savefig(buffer, format="png", dpi=80)
        picture = Image(buffer.getvalue(), alt="training loss, and AUROC on validation patients, by step")
        if self._shown is None:
            self._shown = display(picture, display_id=True)
        else:
            self._shown.update(picture)
