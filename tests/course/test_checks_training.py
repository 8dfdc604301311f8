"""The exercises of notebooks 03 and 06: the right answer passes, each usual slip gets its own message."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from judged import is_open, is_right, is_wrong
from torch.nn.functional import cross_entropy

from medctkit.experiments.compare.results import load_results, method_table
from medctkit.lora.methods import METHODS
from medctkit.model.ct_clip import CTCLIPConfig
from medctkit.training.objectives import contrastive_loss

pytestmark = pytest.mark.usefixtures("one_thread")


def nearest(axis, of=lambda hits: hits.float().mean()):
    def own_report_share(volumes, texts):
        scores = volumes @ texts.T
        return of(scores.argmax(axis) == torch.arange(len(scores)))

    return own_report_share


def test_share_of_volumes_that_find_their_report():
    assert "recall@1" in is_right("03.1", nearest(1))
    is_wrong("03.1", nearest(0), because="share of reports that find their own volume")
    is_wrong("03.1", nearest(1, lambda hits: hits.sum()), because="divide by how many")
    is_wrong("03.1", lambda v, t: (v @ t.T).diagonal().mean(), because="mean similarity")
    is_wrong("03.1", lambda v, t: 0.0, because="gives 0.000")
    is_wrong("03.1", lambda v, t: v @ t.T, because="a single number")
    is_open("03.1", lambda v, t: ...)


def warm(step, steps, peak, offset=1, fall=lambda x: (1 + math.cos(math.pi * x)) / 2, end=0):
    up = round(0.1 * steps)
    return peak * (step + offset) / up if step < up else peak * fall((step - up) / (steps - up - end))


def test_learning_rate_rises_and_falls_as_the_package_does():
    is_right("03.2", lambda step, steps, peak: warm(step, steps, peak))
    is_wrong("03.2", lambda *a: warm(*a, offset=0), because="would learn nothing")
    is_wrong("03.2", lambda *a: warm(*a, fall=lambda x: 1 - x), because="straight line")
    is_wrong("03.2", lambda *a: warm(*a, fall=lambda x: 1.0), because="stays at its peak")
    is_wrong("03.2", lambda step, steps, peak: peak, because="begins at its peak")
    is_wrong("03.2", lambda *a: warm(*a, fall=lambda x: math.cos(math.pi * x / 2)), because="times what the package")
    is_wrong("03.2", lambda *a: warm(*a, end=1), because="0 one step after the last")
    is_wrong("03.2", lambda step: 0.1, because="stopped with TypeError")
    is_open("03.2", lambda step, steps, peak: None)


def masked_loss(fill=-math.inf, own_too=False, directions=2):
    def info_nce_of_groups(volumes, texts, temperature, groups):
        scores, own = temperature.exp() * volumes @ texts.T, torch.arange(len(volumes))
        same = groups[:, None] == groups[None, :]
        if not own_too:
            same[own, own] = False
        scores = scores.masked_fill(same, fill)
        there, back = cross_entropy(scores, own), cross_entropy(scores.T, own)
        return there if directions == 1 else (there + back) / 2

    return info_nce_of_groups


def test_equal_reports_are_no_negatives():
    is_right("03.3", masked_loss())
    is_right("03.3", contrastive_loss)
    is_wrong("03.3", lambda v, t, temperature, groups: contrastive_loss(v, t, temperature), because="six different")
    is_wrong("03.3", masked_loss(own_too=True), because="must stay")
    is_wrong("03.3", masked_loss(fill=0.0), because="A score of 0 still counts")
    is_wrong("03.3", masked_loss(directions=1), because="one direction only")
    is_wrong("03.3", lambda *a: 2 * masked_loss()(*a), because="two of them with the same report")
    is_wrong("03.3", lambda v, t, temperature, groups: v, because="a single number")
    is_open("03.3", lambda *a: ...)


def test_the_step_is_chosen_on_validation_patients():
    history = pd.DataFrame(
        {
            "step": range(6),
            "loss": [np.nan, 5.0, 4.0, 3.0, 3.5, 3.2],
            "score": [0.50, np.nan, 0.61, np.nan, 0.64, 0.63],
        }
    )
    is_right("03.4", 4, history)
    is_right("03.4", np.int64(4), history)
    is_wrong("03.4", 3, history, because="lowest training loss")
    is_wrong("03.4", 1, history, because="was not validated, so there is no adapter of it to keep.")
    is_wrong("03.4", 5, history, because="The last step is not always the best")
    is_wrong("03.4", 2, history, because="AUROC at step 2 is 0.610")
    is_wrong("03.4", 99, history, because="goes from 0 to 5")
    is_wrong("03.4", "the best", history, because="Expected the number of a step")
    is_open("03.4", ..., history)


@pytest.mark.parametrize(("hidden", "inner", "layers"), [(768, 3072, 12), (128, 256, 2)])
def test_lora_on_the_feed_forward_is_counted(hidden, inner, layers):
    text = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": 4}
    config = CTCLIPConfig(text_config=text)
    right = 8 * (hidden + inner) * 2 * layers
    is_right("06.1", right, config)
    is_wrong("06.1", 8 * (hidden + inner) * 2, config, because="That is one layer" if layers > 2 else "That is half")
    is_wrong("06.1", 8 * (hidden + inner) * layers, config, because="one of the two matrices")
    is_wrong("06.1", 2 * hidden * inner * layers, config, because="full fine-tuning")
    is_wrong("06.1", 8 * 2 * hidden * 2 * layers, config, because="not square")
    is_wrong("06.1", right + 1, config, because="times what peft adds")
    is_wrong("06.1", "many", config, because="Expected a number of parameters, a single number; got str 'many'")
    is_open("06.1", ..., config)


def enough(power, add=1):
    def directions(strengths, share):
        energy = np.cumsum(strengths**power) / np.sum(strengths**power)
        return int(np.sum(energy < share - 1e-12)) + add

    return directions


def test_directions_are_counted_by_squared_length():
    is_right("06.2", enough(2))
    is_wrong("06.2", enough(1), because="sum of their squares")
    is_wrong("06.2", enough(2, add=0), because="Counting begins at one")
    more = lambda s, share: int(np.argmax(np.cumsum(s**2) / np.sum(s**2) > share)) + 1  # noqa: E731
    is_wrong("06.2", more, because="share of 0.5 you say 3, not 2")
    is_wrong("06.2", lambda strengths, share: 7, because="you say 7, not 2")
    is_open("06.2", lambda strengths, share: ...)


@pytest.fixture(scope="module")
def results():
    return load_results()


def draws(results, method):
    runs = results.runs[(results.runs["group"] == "methods") & (results.runs["method"] == method)]
    return np.stack([results.draws[name] for name in runs["name"]]).astype(float)


def ends(values):
    return tuple(np.percentile(values, (2.5, 97.5)))


def test_a_difference_is_taken_draw_by_draw(results):
    lora, full = draws(results, "lora"), draws(results, "full")
    difference = (full.mean(0) - lora.mean(0))[1:]
    low, high = ends(difference)
    assert f"{'leaves out' if low * high > 0 else 'holds'} zero" in is_right("06.3", (low, high), results)
    is_wrong("06.3", ends(-difference), results, because="LoRA minus full")
    is_wrong("06.3", ends((full - lora)[0, 1:]), results, because="That is one seed")
    apart = [b - a for a, b in zip(ends(lora.mean(0)[1:]), ends(full.mean(0)[1:]), strict=True)]
    is_wrong("06.3", tuple(sorted(apart)), results, because="no interval")
    all_pairs = np.subtract.outer(full.mean(0)[1:], lora.mean(0)[1:])
    is_wrong("06.3", ends(all_pairs), results, because="not all from all")
    is_wrong("06.3", (0.5, 0.6), results, because="is not the 95 % interval")
    is_wrong("06.3", (0.6, 0.5), results, because="lies above")
    is_wrong("06.3", 0.02, results, because="two ends")
    is_open("06.3", (..., ...), results)


def test_worth_it_is_what_nothing_cheaper_reaches(results):
    table = method_table(results)
    here = table[table["any_prompt"] & (table["trainable"] > 0)]
    front = [
        row.method
        for row in here.itertuples()
        if not (
            (here["trainable"] <= row.trainable) & (here["auroc"] >= row.auroc) & (here["method"] != row.method)
        ).any()
    ]
    assert "Pareto front" in is_right("06.4", front, table)
    is_right("06.4", (name for name in front), table)
    worse = next(name for name in here["method"] if name not in front)
    is_wrong("06.4", [*front, worse], table, because=f"{METHODS[worse].label} should not be in the list")
    is_wrong("06.4", front[1:], table, because=f"{METHODS[front[0]].label} is missing")
    is_wrong("06.4", [*front, "linear-probe"], table, because="takes no prompt")
    is_wrong("06.4", [*front, "loraa"], table, because="'loraa' is no method")
    is_wrong("06.4", "lora", table, because="Expected a list")
    is_open("06.4", ..., table)
