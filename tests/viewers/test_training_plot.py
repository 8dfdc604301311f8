"""A fine-tuning run as a picture, while it runs and afterwards."""

import math

import pandas as pd
import pytest

from medctkit.viewers import training_plot


def some_rows(steps=30):
    rows = [{"step": 0, "score": 0.55, "seconds": 0.0}]
    for step in range(1, steps + 1):
        rows.append({"step": step, "contrastive": 3.4 - step / 50, "prompts": 0.6, "loss": 4.0, "seconds": step})
        if step % 10 == 0:
            rows[-1]["score"] = 0.55 + math.sin(step / 20) / 10
    return rows


def test_training_figure_shows_losses_scores_and_guessing():
    rows = some_rows()
    left, right = training_plot.training_figure(pd.DataFrame(rows), batch_size=32).axes
    assert [line.get_label() for line in left.lines] == ["contrastive", "prompts", "guessing, ln 32"]
    assert left.lines[2].get_ydata()[0] == pytest.approx(math.log(32))
    assert right.lines[0].get_ydata() == pytest.approx([row["score"] for row in rows if "score" in row])
    assert right.lines[1].get_xdata()[0] == 30 and "0.650" in right.lines[1].get_label()
    first, _ = training_plot.training_figure(pd.DataFrame(rows[:1])).axes  # before the first step
    assert not first.lines


def test_training_plot_updates_one_picture_at_each_score_and_outside_a_notebook_only_collects(monkeypatch):
    shown = []

    class Handle:
        update = shown.append

    monkeypatch.setattr(training_plot, "get_ipython", lambda: object())
    monkeypatch.setattr(training_plot, "display", lambda picture, display_id: shown.append(picture) or Handle)
    plot = training_plot.TrainingPlot(batch_size=32)
    for row in some_rows():
        plot(row)
    assert len(plot.rows) == 31 and plot.history["step"].iloc[-1] == 30
    assert len(shown) == 4 and all(picture.data.startswith(b"\x89PNG") for picture in shown)
    monkeypatch.setattr(training_plot, "get_ipython", lambda: None)
    plot(some_rows()[10])
    assert len(shown) == 4 and len(plot.history) == 32
