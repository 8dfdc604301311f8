"""Checks of the exercises of notebooks 03, fine-tuning, and 06, which parameters are worth training.

Each compares an answer with what the package computes, looks for the usual slips first, and never says the answer.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from medctkit.course.exercises import Wrong, checks, close, interval, number

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from medctkit.experiments.compare.results import Results
    from medctkit.model.ct_clip import CTCLIPConfig


# --- notebook 03 ----------------------------------------------------------------------------------------


@checks("03.1")
def _own_report_share(own_report_share: Callable) -> str:
    import torch

    generator = torch.Generator().manual_seed(1)
    texts = torch.nn.functional.normalize(torch.randn(40, 8, generator=generator), dim=-1)
    noise = torch.randn(40, 8, generator=generator)
    volumes = torch.nn.functional.normalize(texts + 0.5 * noise, dim=-1)
    scores, own = volumes @ texts.T, torch.arange(40)
    right, reverse = ((scores.argmax(axis) == own).double().mean().item() for axis in (1, 0))
    found = number(own_report_share(volumes, texts), "the share of volumes")
    if close(found, 40 * right):
        raise Wrong("That is how many volumes find their own report; divide by how many there are.")
    if close(found, reverse):
        raise Wrong(
            "That is the share of reports that find their own volume. Rows are volumes and columns are reports: "
            "along which of the two does the nearest report have to be looked for?"
        )
    if close(found, scores.diagonal().mean().item()):
        raise Wrong("That is the mean similarity to the own report. Count how often it is the largest of its row.")
    if not close(found, right):
        raise Wrong(
            f"For 40 volumes of which {round(40 * right)} are nearest to their own report, your function gives "
            f"{found:.3f}. Find the column of the largest score of each row, and compare it with the row's number."
        )
    return (
        "This is recall@1, the plainest measure of retrieval; `zero_shot.retrieval` has it with intervals. With more "
        "reports to choose from it falls, so always say how many there were."
    )


@checks("03.2")
def _learning_rate(rate: Callable) -> str:
    from medctkit.training.loop import learning_rate_factor

    def at(step: int, steps: int = 200, peak: float = 3e-3) -> tuple[float, float]:
        expected = peak * learning_rate_factor(step, steps, 0.1)
        return number(rate(step, steps, peak), f"a learning rate at step {step}"), expected

    first, expected = at(0)
    if first == 0:
        raise Wrong("At step 0 your rate is 0, and the first step would learn nothing. Count steps from 1 in the rise.")
    if close(first, 3e-3):
        raise Wrong("Your rate begins at its peak: the warm-up, the first tenth of the steps, is missing.")
    if not close(first, expected):
        raise Wrong(f"At step 0 of 200, with peak 0.003, your rate is {first:.3g}; the rise takes 20 equal steps.")
    last, expected = at(19)
    if not close(last, expected):
        raise Wrong(f"At step 19 of 200, the last of the warm-up, your rate is {last:.3g}; it should be at its peak.")
    middle, expected = at(65)
    if close(middle, 3e-3):
        raise Wrong("After the warm-up your rate stays at its peak; it has to fall along a cosine.")
    if close(middle, 3e-3 * (1 - 45 / 180)):
        raise Wrong("Your rate falls along a straight line; a cosine falls slowly at first and at the end.")
    for step, steps, peak in ((65, 200, 3e-3), (110, 200, 3e-3), (199, 200, 3e-3), (40, 50, 1.0)):
        found, expected = at(step, steps, peak)
        if not close(found, expected, 1e-3):
            raise Wrong(
                f"At step {step} of {steps} with peak {peak:g} your rate is {found:.3g}, {found / expected:.2f} times "
                "what the package uses. Does the cosine begin where the warm-up ends, and end at the last step?"
            )
    return (
        "AdamW knows little about the size of gradients in its first steps, hence the gentle start; the long end lets "
        "the weights settle. The rate at its peak is what one tunes."
    )


@checks("03.3")
def _same_report(info_nce_of_groups: Callable) -> str:
    import torch

    from medctkit.training.objectives import contrastive_loss

    generator = torch.Generator().manual_seed(2)
    volumes, texts = (torch.nn.functional.normalize(torch.randn(6, 8, generator=generator), dim=-1) for _ in range(2))
    texts[4] = texts[1]
    groups, temperature = torch.tensor([0, 1, 2, 3, 1, 5]), torch.tensor(1.5)
    right = contrastive_loss(volumes, texts, temperature, groups).item()
    found = number(info_nce_of_groups(volumes, texts, temperature, groups), "the loss", finite=False)
    if not math.isfinite(found):
        raise Wrong(
            f"Your loss is {found}. A volume and its own report are in the same group too: they must stay, or there "
            "is nothing to find."
        )
    if close(found, contrastive_loss(volumes, texts, temperature).item()):
        raise Wrong("Your loss is that of six different reports: volumes 1 and 4 are still each other's negatives.")
    scores = temperature.exp() * volumes @ texts.T
    same = (groups[:, None] == groups[None, :]) & ~torch.eye(6, dtype=torch.bool)
    own = torch.arange(6)
    zeroed = scores.masked_fill(same, 0.0)
    if close(found, ((_ce(zeroed, own) + _ce(zeroed.T, own)) / 2).item()):
        raise Wrong("A score of 0 still counts in the softmax, as exp(0) = 1. Which score would not?")
    masked = scores.masked_fill(same, -math.inf)
    if any(close(found, _ce(part, own).item()) for part in (masked, masked.T)):
        raise Wrong("That is one direction only; the loss is the mean of volume to report and report to volume.")
    if not close(found, right, 1e-3):
        raise Wrong(f"For six volumes, two of them with the same report, your loss is {found:.3f}, not {right:.3f}.")
    return (
        "Normal scans share their wording, and two reconstructions of one scan share their report: punishing a model "
        "for finding them alike would teach it something false."
    )


def _ce(scores: "torch.Tensor", own: "torch.Tensor") -> "torch.Tensor":
    from torch.nn.functional import cross_entropy

    return cross_entropy(scores, own)


@checks("03.4")
def _when_to_stop(chosen_step: int, history: "pd.DataFrame") -> str:
    step = number(chosen_step, "the number of a step")
    scored = history.dropna(subset=["score"])
    if step not in set(history["step"]):
        raise Wrong(f"There is no step {step:g} in the history, which goes from 0 to {history['step'].max()}.")
    if step not in set(scored["step"]):
        lowest = step == history.loc[history["loss"].idxmin(), "step"]
        why = " It has the lowest training loss, but that is of one batch." if lowest else ""
        raise Wrong(f"Step {step:g} was not validated, so there is no adapter of it to keep.{why}")
    best, here = scored["score"].max(), scored.loc[scored["step"] == step, "score"].item()
    if here < best:
        last = " The last step is not always the best." if step == scored["step"].max() else ""
        raise Wrong(f"Validation AUROC at step {step:g} is {here:.3f}; elsewhere it was higher.{last}")
    return (
        "The same step that `finetune` kept. Its validation AUROC is a little too good by now: of several numbers we "
        "took the highest. That is why notebook 04 uses other patients."
    )


# --- notebook 06 ----------------------------------------------------------------------------------------


@checks("06.1")
def _feed_forward(trainable: int, config: "CTCLIPConfig") -> str:
    import torch

    from medctkit.lora.adapter import add_lora
    from medctkit.lora.counting import count_trainable
    from medctkit.model.ct_clip import CTCLIPModel
    from medctkit.model.ct_clip_parts import TEXT_LAYER

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
    if found in slips and found != right:
        raise Wrong(slips[found])
    if found != right:
        raise Wrong(
            f"{found:,.0f} is {found / right:.2f} times what peft adds. Each of {layers} layers has a matrix from "
            f"{hidden} to {inner} channels and one back; each gets `r (d_in + d_out)` numbers."
        )
    return (
        "peft agrees. Most of a transformer's weights are in its feed-forwards, and one careful study of language "
        "models found LoRA more useful there than in attention (arXiv 2405.09673). MedCT-VLM chose attention."
    )


@checks("06.2")
def _directions(directions: Callable) -> str:
    for strengths, share in (((3.0, 2.0, 1.0), 0.9), ((1.0,) * 10, 0.95), ((5.0, 0.1), 0.9), ((4.0, 3.0, 0.0), 0.64)):
        s = np.array(strengths)
        energy = np.cumsum(s**2) / np.sum(s**2)
        right = int(np.argmax(energy >= share - 1e-12)) + 1
        found = number(directions(s, share), "how many directions")
        if found == right:
            continue
        shown = ", ".join(f"{x:g}" for x in strengths)
        if found == right - 1:
            raise Wrong(
                f"For strengths {shown} and a share of {share:g} you say {found:g}, but with so many it is "
                f"{energy[right - 2] if right > 1 else 0:.2f}: the share isn't reached yet. Counting begins at one."
            )
        linear = int(np.argmax(np.cumsum(s) / s.sum() >= share - 1e-12)) + 1
        if found == linear:
            raise Wrong("You add up the singular values; the squared length is the sum of their squares.")
        raise Wrong(f"For strengths {shown} and a share of {share:g} your function says {found:g}, not {right}.")
    return (
        "The squared length of an update is the sum of its squared singular values, whatever its shape. Few directions "
        "carry most of it; that is what LoRA's authors bet on (arXiv 2106.09685, section 7)."
    )


@checks("06.3")
def _by_chance(found: tuple[float, float], results: "Results") -> str:
    from medctkit.experiments.compare.results import pooled
    from medctkit.metrics.bootstrap import LEVEL

    low, high = interval(found)
    runs = results.runs[results.runs["group"] == "methods"]
    lora, full = (
        np.stack([results.draws[name] for name in runs.loc[runs["method"] == method, "name"]]).astype(float)
        for method in ("lora", "full")
    )

    def same(ends: Sequence[float] | np.ndarray) -> bool:
        return max(abs(low - ends[0]), abs(high - ends[1])) < 2e-4

    def ends_of(values: np.ndarray) -> np.ndarray:
        return np.percentile(values, LEVEL)

    difference = (full.mean(0) - lora.mean(0))[1:]
    right = ends_of(difference)
    if same(-right[::-1]):
        raise Wrong("That is LoRA minus full fine-tuning; asked for is full fine-tuning minus LoRA.")
    if any(same(ends_of((full - lora)[seed, 1:])) for seed in range(len(lora))):
        raise Wrong("That is one seed. Average the seeds of each method first, resample by resample.")
    table = pooled(results, "methods").set_index("method")
    ends = table.loc["full", ["auroc_low", "auroc_high"]] - table.loc["lora", ["auroc_low", "auroc_high"]].to_numpy()
    if same(sorted(ends)):
        raise Wrong("The difference of two intervals' ends is no interval. Subtract draws, then take percentiles.")
    if same(ends_of(np.subtract.outer(full.mean(0)[1:], lora.mean(0)[1:]))):
        raise Wrong("Resample i is the same patients for both methods: subtract draw i from draw i, not all from all.")
    if not same(right):
        raise Wrong(
            f"[{low:+.3f}, {high:+.3f}] is not the 95 % interval of the difference. Draw 0 is the data as it is; the "
            "resamples begin at 1."
        )
    overlap = table.loc["full", "auroc_low"] < table.loc["lora", "auroc_high"]
    clear = right[0] > 0 or right[1] < 0
    seen = "The two methods' own intervals overlap, " if overlap else "The two methods' own intervals lie apart, "
    seen += f"and {'yet ' if overlap and clear else ''}that of their difference "
    seen += "leaves out zero. " if clear else "holds zero. "
    return seen + "What is hard for one method is hard for the other, so compare pairs: it takes that part off."


@checks("06.4")
def _worth_it(worth: Sequence[str], table: "pd.DataFrame") -> str:
    if isinstance(worth, str) or not all(isinstance(name, str) for name in worth):
        raise Wrong('Expected a list of names of methods, such as `["lora", "full"]`.')
    rows = table[table["zero_shot"] & (table["trainable"] > 0)].set_index("method")
    chosen = set(worth)
    if "linear-probe" in chosen:
        raise Wrong("The linear probe isn't zero-shot: it answers 18 questions and no other. Leave it out.")
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
