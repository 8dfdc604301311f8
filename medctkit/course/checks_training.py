"""Checks of the exercises of notebooks 03, fine-tuning, and 06, which parameters are worth training.

Each compares an answer with what the package computes, looks for the usual slips first, and never says the answer.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import cross_entropy, normalize

from medctkit.course.exercises import Wrong, checks, expect, interval, number
from medctkit.experiments.compare.results import Results, pooled
from medctkit.lora.adapter import add_lora
from medctkit.lora.counting import count_trainable
from medctkit.metrics.bootstrap import LEVEL
from medctkit.model.ct_clip import CTCLIPConfig, CTCLIPModel
from medctkit.model.ct_clip_parts import TEXT_LAYER
from medctkit.training.loop import learning_rate_factor
from medctkit.training.objectives import contrastive_loss

# --- notebook 03 ----------------------------------------------------------------------------------------


@checks("03.1")
def _own_report_share(own_report_share: Callable) -> str:
    generator = torch.Generator().manual_seed(1)
    texts = torch.nn.functional.normalize(torch.randn(40, 8, generator=generator), dim=-1)
    noise = torch.randn(40, 8, generator=generator)
    volumes = torch.nn.functional.normalize(texts + 0.5 * noise, dim=-1)
    scores, own = volumes @ texts.T, torch.arange(40)
    right, reverse = ((scores.argmax(axis) == own).double().mean().item() for axis in (1, 0))
    found = number(own_report_share(volumes, texts), "the share of volumes")
    slips = {
        40 * right: "That is how many volumes find their own report; divide by how many there are.",
        reverse: "That is the share of reports that find their own volume. Rows are volumes and columns are reports: "
        "along which of the two does the nearest report have to be looked for?",
        scores.diagonal().mean().item(): "That is the mean similarity to the own report. Count how often it is the "
        "largest of its row.",
    }
    otherwise = (
        f"For 40 volumes of which {40 * right:.0f} are nearest to their own report, your function gives {found:.3f}. "
        "Find the column of the largest score of each row, and compare it with the row's number."
    )
    expect(found, right, slips, otherwise)
    return (
        "This is recall@1, the plainest measure of retrieval; `zero_shot.retrieval` has it with intervals. With more "
        "reports to choose from it falls, so always say how many there were."
    )


@checks("03.2")
def _learning_rate(rate: Callable) -> str:
    peak = 3e-3
    straight = peak * (1 - 45 / 180)  # at step 65, a quarter of the fall is behind
    usual = {
        0: {
            0: "At step 0 your rate is 0, and the first step would learn nothing. Count steps from 1 in the rise.",
            peak: "Your rate begins at its peak: the warm-up, the first tenth of the steps, is missing.",
        },
        65: {
            peak: "After the warm-up your rate stays at its peak; it has to fall along a cosine.",
            straight: "Your rate falls along a straight line; a cosine falls slowly at first and at the end.",
        },
    }
    for step, steps, top in ((0, 200, peak), (19, 200, peak), (65, 200, peak), (110, 200, peak), (40, 50, 1.0)):
        found = number(rate(step, steps, top), f"a learning rate at step {step}")
        right = top * learning_rate_factor(step, steps, 0.1)
        otherwise = (
            f"At step {step} of {steps} with peak {top:g} your rate is {found:.3g}, {found / right:.2f} times what the "
            "package uses. The rise takes a tenth of the steps; the cosine takes the others, and would be 0 "
            "one step after the last."
        )
        expect(found, right, usual.get(step, {}), otherwise, 1e-3)
    return (
        "AdamW knows little about the size of gradients in its first steps, hence the gentle start; the long end lets "
        "the weights settle. The rate at its peak is what one tunes."
    )


@checks("03.3")
def _same_report(info_nce_of_groups: Callable) -> str:
    generator = torch.Generator().manual_seed(2)
    volumes, texts = (normalize(torch.randn(6, 8, generator=generator), dim=-1) for _ in range(2))
    texts[4] = texts[1]
    groups, temperature = torch.tensor([0, 1, 2, 3, 1, 5]), torch.tensor(1.5)
    right = contrastive_loss(volumes, texts, temperature, groups).item()
    found = number(info_nce_of_groups(volumes, texts, temperature, groups), "the loss", finite=False)
    if not math.isfinite(found):
        raise Wrong(
            f"Your loss is {found}. A volume and its own report are in the same group too: they must stay, or there "
            "is nothing to find."
        )
    scores, own = temperature.exp() * volumes @ texts.T, torch.arange(6)
    same = (groups[:, None] == groups) & ~torch.eye(6, dtype=torch.bool)

    def directions(fill: float) -> list[float]:
        filled = scores.masked_fill(same, fill)
        return [cross_entropy(part, own).item() for part in (filled, filled.T)]

    slips = {
        contrastive_loss(volumes, texts, temperature).item(): "Your loss is that of six different reports: volumes 1 "
        "and 4 are still each other's negatives.",
        sum(directions(0.0)) / 2: "A score of 0 still counts in the softmax, as exp(0) = 1. Which score would not?",
    }
    one = "That is one direction only; the loss is the mean of volume to report and report to volume."
    slips |= dict.fromkeys(directions(-math.inf), one)
    otherwise = f"For six volumes, two of them with the same report, your loss is {found:.3f}, not {right:.3f}."
    expect(found, right, slips, otherwise)
    return (
        "Normal scans share their wording, and two reconstructions of one scan share their report: punishing a model "
        "for finding them alike would teach it something false."
    )


@checks("03.4")
def _when_to_stop(chosen_step: int, history: pd.DataFrame) -> str:
    step = number(chosen_step, "the number of a step")
    scores = history.dropna(subset=["score"]).set_index("step")["score"]
    if step not in set(history["step"]):
        raise Wrong(f"There is no step {step:g} in the history, which goes from 0 to {history['step'].max()}.")
    if step not in scores.index:
        lowest = step == history.loc[history["loss"].idxmin(), "step"]
        why = " It has the lowest training loss, but that is of one batch." if lowest else ""
        raise Wrong(f"Step {step:g} was not validated, so there is no adapter of it to keep.{why}")
    if scores[step] < scores.max():
        last = " The last step is not always the best." if step == scores.index.max() else ""
        raise Wrong(f"Validation AUROC at step {step:g} is {scores[step]:.3f}; elsewhere it was higher.{last}")
    return (
        "The same step that `finetune` kept. Its validation AUROC is a little too good by now: of several numbers we "
        "took the highest. That is why notebook 04 uses other patients."
    )


# --- notebook 06 ----------------------------------------------------------------------------------------


@checks("06.1")
def _feed_forward(trainable: int, config: CTCLIPConfig) -> str:
    found, rank = number(trainable, "a number of parameters"), 8
    with torch.device("meta"):
        model = add_lora(CTCLIPModel(config), r=rank, target_modules=TEXT_LAYER + r"(?:intermediate|output)\.dense")
    right, text = count_trainable(model), config.text_config
    hidden, inner, layers = (text[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    slips = {
        hidden * inner * 2 * layers: "That is what full fine-tuning would train there: `d_in * d_out` of each matrix.",
        right // layers: f"That is one layer; the text encoder has {layers}.",
        right // 2: "That is one of the two matrices of each layer: widening and narrowing have a LoRA.",
        rank * hidden * 4 * layers: f"Both matrices are between {hidden} and {inner} channels, not square.",
    }
    if layers == 2:
        slips[right // 2] = "That is half of it: one of the two layers, or one of the two matrices of each."
    otherwise = (
        f"{found:,.0f} is {found / right:.2f} times what peft adds. Each of {layers} layers has a matrix from "
        f"{hidden} to {inner} channels and one back; each gets `r (d_in + d_out)` numbers."
    )
    expect(found, right, slips, otherwise, tolerance=0)
    return (
        "peft agrees. Most of a transformer's weights are in its feed-forwards, and one careful study of language "
        "models found LoRA more useful there than in attention (arXiv 2405.09673). MedCT-VLM chose attention."
    )


@checks("06.2")
def _directions(directions: Callable) -> str:
    for strengths, share in (((3.0, 2.0, 1.0), 0.9), ((1.0,) * 10, 0.95), ((5.0, 0.1), 0.9), ((1.0,) * 4, 0.5)):
        s = np.array(strengths)
        found = number(directions(s, share), "how many directions")
        linear, right = (
            int(np.argmax(np.cumsum(s**power) / np.sum(s**power) >= share - 1e-12)) + 1 for power in (1, 2)
        )
        said = f"For strengths {', '.join(f'{x:g}' for x in strengths)} and a share of {share:g} you say {found:g}"
        slips = {
            linear: "You add up the singular values; the squared length is the sum of their squares.",
            right - 1: f"{said}, but with so many the share isn't reached yet. Counting begins at one.",
        }
        expect(found, right, slips, f"{said}, not {right}.", tolerance=0)
    return (
        "The squared length of an update is the sum of its squared singular values, whatever its shape. Few directions "
        "carry most of it; that is what LoRA's authors bet on (arXiv 2106.09685, section 7)."
    )


@checks("06.3")
def _by_chance(found: tuple[float, float], results: Results) -> str:
    low, high = interval(found)
    runs = results.runs[results.runs["group"] == "methods"]
    lora, full = (
        np.stack([results.draws[name] for name in runs.loc[runs["method"] == method, "name"]]).astype(float)
        for method in ("lora", "full")
    )

    def ends_of(values: np.ndarray) -> tuple[float, float]:
        return tuple(np.percentile(values, LEVEL))

    difference = (full.mean(0) - lora.mean(0))[1:]
    right = ends_of(difference)
    table = pooled(results, "methods").set_index("method")[["auroc_low", "auroc_high"]]
    slips = {
        ends_of(-difference): "That is LoRA minus full fine-tuning; asked for is full fine-tuning minus LoRA.",
        tuple(sorted(table.loc["full"] - table.loc["lora"])): "The difference of two intervals' ends is no interval. "
        "Subtract draws, then take percentiles.",
        ends_of(np.subtract.outer(full.mean(0)[1:], lora.mean(0)[1:])): "Resample i is the same patients for both "
        "methods: subtract draw i from draw i, not all from all.",
    }
    one = "That is one seed. Average the seeds of each method first, resample by resample."
    slips |= dict.fromkeys(map(ends_of, (full - lora)[:, 1:]), one)
    otherwise = (
        f"[{low:+.3f}, {high:+.3f}] is not the 95 % interval of the difference. Draw 0 is the data as it is; the "
        "resamples begin at 1."
    )
    expect((low, high), right, slips, otherwise, tolerance=1e-2)
    overlap = table.loc["full", "auroc_low"] < table.loc["lora", "auroc_high"]
    clear = right[0] > 0 or right[1] < 0
    seen = f"The two methods' own intervals {'overlap' if overlap else 'lie apart'}, and "
    seen += f"{'yet ' if overlap and clear else ''}that of their difference {'leaves out' if clear else 'holds'} zero. "
    return seen + "What is hard for one method is hard for the other, so compare pairs: it takes that part off."


@checks("06.4")
def _worth_it(worth: Sequence[str], table: pd.DataFrame) -> str:
    chosen = set(worth)
    if isinstance(worth, str) or not all(isinstance(name, str) for name in chosen):
        raise Wrong('Expected a list of names of methods, such as `["lora", "full"]`.')
    rows = table[table["any_prompt"] & (table["trainable"] > 0)].set_index("method")
    if "linear-probe" in chosen:
        raise Wrong("The linear probe takes no prompt: it answers 18 questions and no other. Leave it out.")
    if unknown := sorted(chosen - set(rows.index)):
        raise Wrong(f"{unknown[0]!r} is no method that trains something; they are {', '.join(rows.index)}.")
    for name, row in rows.iterrows():
        cheaper = rows[(rows["trainable"] <= row["trainable"]) & (rows["auroc"] >= row["auroc"])].drop(index=name)
        if len(cheaper) and name in chosen:
            better = cheaper.iloc[0]
            raise Wrong(
                f"{row['label']} should not be in the list: another method trains no more, {better['trainable']:,.0f} "
                f"parameters, and has a mean AUROC of {better['auroc']:.3f} against {row['auroc']:.3f}."
            )
        if not len(cheaper) and name not in chosen:
            raise Wrong(f"{row['label']} is missing: nothing that trains as little or less reaches {row['auroc']:.3f}.")
    return (
        "This is the Pareto front: each of these is the best that can be had for its size, by the point estimates. "
        "Look at the intervals before you call a neighbour worse: another cohort may choose others."
    )
