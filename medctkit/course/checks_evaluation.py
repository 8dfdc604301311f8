"""Checks of the exercises of notebooks 04, zero-shot evaluation, and 05, slices and attention.

Each compares an answer with what the package computes, looks for the usual slips first, and never says the answer.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from medctkit.attention.localisation import score_maps
from medctkit.course.exercises import Wrong, checks, expect, number
from medctkit.findings import FINDINGS
from medctkit.metrics.scores import ON_TEST, evaluate
from medctkit.training.objectives import report_prompts
from medctkit.zero_shot.classifier import Embedded, ZeroShotClassifier
from medctkit.zero_shot.prompts import Prompts, prompt_sentences


def _means(
    labels: np.ndarray, scores: np.ndarray, patients: np.ndarray, thresholds: Any = 0.5, resamples: int = 1
) -> pd.Series:
    """The row of means of `medctkit.metrics.scores.evaluate`; with one resample its intervals mean nothing."""
    return evaluate(labels, scores, patients, thresholds=thresholds, resamples=resamples).loc["mean"]


# --- notebook 04 ----------------------------------------------------------------------------------------


@checks("04.1")
def _sensitivity_and_specificity(sensitivity_and_specificity: Callable) -> str:
    #                    positives               negatives
    labels = np.array([1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0])
    scores = np.array([0.9, 0.8, 0.6, 0.5, 0.1, 0.7, 0.5, 0.4, 0.3, 0.2, 0.2, 0.1])
    found = sensitivity_and_specificity(labels, scores, 0.5)
    try:
        first, second = (number(value, "a share") for value in found)
    except (TypeError, ValueError):
        raise Wrong("Expected two numbers, sensitivity and specificity.") from None

    def rates(called: np.ndarray) -> tuple[float, float]:
        return called[labels == 1].mean(), (~called[labels == 0]).mean()

    right = rates(scores >= 0.5)
    counts, precision = (right[0] * 5, right[1] * 7), labels[scores >= 0.5].mean()
    otherwise = (
        f"Of 5 sick and 7 healthy patients you get ({first:.2f}, {second:.2f}) at a threshold of 0.5, where "
        f"{counts[0]:.0f} of the sick and {counts[1]:.0f} of the healthy are called right."
    )
    slips = {
        right[::-1]: "The two are in the wrong order: sensitivity is about the sick, specificity about the healthy.",
        rates(scores > 0.5): "A score exactly at the threshold counts as positive in the package: `>=`, not `>`.",
        (precision, second): "Your first number is the precision, the share of alarms that are true. Divide by the "
        "sick.",
        (first, 1 - right[1]): "Your second number is the share of the healthy who are called sick; specificity is the "
        "rest.",
        counts: "Those are counts; divide the first by the number of the sick, the second by that of the healthy.",
    }
    expect((first, second), right, slips, otherwise)
    return (
        "Neither depends on how many patients are sick, so they carry over to another ward; how many alarms are true "
        "does not."
    )


@checks("04.2")
def _flattery(flattery: float, labels: np.ndarray, scores: np.ndarray, patients: np.ndarray, thresholds: Any) -> str:
    found = number(flattery, "the difference of two macro-F1s")
    honest, optimistic = (_means(labels, scores, patients, limits) for limits in (thresholds, ON_TEST))
    gain = {name: optimistic[name] - honest[name] for name in ("f1", "accuracy", "auroc")}
    slips = {
        -gain["f1"]: "That is honest minus optimistic; the flattery is what the test labels add.",
        optimistic["f1"]: "That is the optimistic macro-F1 itself; subtract the honest one.",
        gain["accuracy"]: "That is the difference in accuracy. Asked for is macro-F1: column `f1`, row `mean`.",
        gain["auroc"]: "AUROC needs no threshold, so nothing changes it. Asked for is macro-F1: column `f1`.",
    }
    otherwise = (
        f"{found:+.4f} is not the difference. Both evaluations are of the same scores; only `thresholds` changes, once "
        f"those of the validation patients, once {ON_TEST!r}."
    )
    expect(found, gain["f1"], slips, otherwise)
    return (
        "A threshold chosen on the labels it is judged by has seen the answers. The rarer a finding, the more there is "
        "to gain; the package marks such a table as optimistic wherever it is shown."
    )


@checks("04.3")
def _twice_the_volumes(
    by_patients: float, by_volumes: float, labels: np.ndarray, scores: np.ndarray, patients: np.ndarray
) -> str:
    found = number(by_patients, "a width"), number(by_volumes, "a width")

    def width(copies: int, names: np.ndarray) -> float:
        mean = _means(np.tile(labels, (copies, 1)), np.tile(scores, (copies, 1)), names, resamples=200)
        return mean["auroc_high"] - mean["auroc_low"]

    right = width(2, np.tile(patients, 2)), width(2, np.arange(2 * len(labels)))
    slips = {
        right[::-1]: "The two are in the wrong order: first the width by patients, then by volumes.",
        (right[0], right[0]): "`by_volumes` still draws patients: give each of the doubled volumes a name of its own, "
        "`np.arange(...)` of twice the length.",
        (right[0], width(1, np.arange(len(labels)))): "`by_volumes` is that of the cohort as it is. Stack labels and "
        "scores twice first.",
    }
    otherwise = (
        f"`by_patients` is {found[0]:.4f} and `by_volumes` {found[1]:.4f}; a width is auroc_high - auroc_low of the "
        f"`mean`, with `resamples=200` and `seed=0`. Of the cohort as it is it is {width(1, patients):.4f}."
    )
    expect(found, right, slips, otherwise, 0.15 * right[1])  # other names in another order draw other resamples
    return (
        f"Doubling every volume adds no patient. By patients the interval stays {right[0]:.3f} wide; by volumes it "
        f"shrinks to {right[1]:.3f}: certainty made of copies, like several reconstructions."
    )


@checks("04.4")
def _own_prompts(prompts: Prompts, mean_auroc: float, model: nn.Module, tokenizer: Any, seen: Embedded) -> str:
    def plain(*sentences: Sequence[str]) -> set[str]:
        return {sentence.strip().rstrip(".").lower() for side in sentences for sentence in side}

    def auroc(asked: Prompts) -> float:
        scores = ZeroShotClassifier(model, tokenizer, asked).scores_from_embeddings(seen.embeddings)
        return _means(seen.labels, scores, seen.patients)["auroc"]

    found = number(mean_auroc, "a mean AUROC")
    try:
        stating, denying = prompt_sentences(prompts)
    except ValueError as error:
        raise Wrong(str(error)) from None
    if stating == denying:
        raise Wrong("Both sides say the same, so no volume can be nearer to one of them.")
    paper = prompt_sentences("paper")
    for k, finding in enumerate(FINDINGS):
        mine = plain(stating[k], denying[k])
        if mine <= plain(paper[0][k], paper[1][k]):
            raise Wrong("Those are the paper's prompts; write your own.")
        for hospital in ("source", "target"):  # of the base model's training, and of the adapter's
            if trained := mine & plain(*report_prompts(hospital)[finding]):
                raise Wrong(
                    f"{min(trained)!r} is a wording that the model was trained with; an evaluation with it would "
                    "ask what was learnt by heart."
                )
    right = auroc(prompts)
    otherwise = (
        f"With these prompts the mean AUROC is not {found:.4f}. Make a `ZeroShotClassifier` with `prompts=`, take its "
        "scores from its embeddings of the validation volumes, and the row `mean` of `metrics.evaluate`."
    )
    expect(found, right, {}, otherwise, 1e-3)
    return (
        f"{right:.3f}, against {auroc('paper'):.3f} with the paper's prompts: same model, same patients, other "
        "words. Without its prompts no such number can be repeated. Whoever tries many has chosen: what the best is "
        "worth, test patients say, once."
    )


# --- notebook 05 ----------------------------------------------------------------------------------------


@checks("05.1")
def _received(received: Callable) -> str:
    generator = torch.Generator().manual_seed(3)
    maps = torch.randn(3, 2, 4, 4, generator=generator).softmax(-1)  # (t, heads, queries, keys)
    found = np.asarray(received(maps), dtype=float)
    right = maps.mean((1, 2)).numpy()
    if found.shape == (3, 2, 4):
        raise Wrong("There is still one map for each head; take their mean, too.")
    if found.shape != (3, 4):
        raise Wrong(f"Maps of 3 slabs with 4 patches each should give shape (3, 4); yours is {found.shape}.")
    slips = {
        0.25: "Every patch gets 1 / 4: you took the mean over the keys; received is what comes in over all queries.",
        tuple(4 * right.ravel()): "That is the sum over the queries; take the mean.",
    }
    otherwise = "The numbers are not the means. Axes are (slab, head, query, key): which ones have to go?"
    expect(found.ravel(), right.ravel(), slips, otherwise)
    return (
        "What a patch takes in always adds up to one; how much it is asked for is where patches differ. "
        "`Attention.received` is this, on the grid of patches."
    )


@checks("05.2")
def _pointing_game(pointing_game: Callable) -> str:
    small, large = np.zeros((2, 2, 3)), np.zeros((2, 2, 3))
    small[0, 1, 2], large[1], large[0, 0, 0] = 0.05, 0.9, 0.3
    on_small, beside, on_edge = np.full((3, 2, 2, 3), 0.05)
    sliver = large + 0.1 * small  # 0.5 % of a patch: too little
    on_small[0, 1, 2] = beside[0, 0, 1] = on_edge[0, 0, 0] = 0.4
    beside[1] = 0.3  # much of it inside the large finding, but the highest patch is not
    cases = {
        "a small finding, 5 % of the highest patch": (on_small, small),
        "a small finding beside the highest patch": (beside, small),
        "a large finding that fills 30 % of the highest patch": (on_edge, large),
        "a large finding beside the highest patch": (beside, large),
        "a finding that fills 0.5 % of the highest patch": (on_small, sliver),
    }
    for case, (heat, shares) in cases.items():
        right = bool(score_maps(heat[None], shares[None])["pointing game"][0])
        said = pointing_game(heat, shares)
        found = np.asarray(said)
        if found.dtype != bool or found.size != 1:
            raise Wrong(f"Expected True or False, got {type(said).__name__}.")
        if right and not found:
            raise Wrong(f"Your function says miss to {case}. A part is enough, it need not be the fullest patch.")
        if found and not right:
            raise Wrong(f"Your function says hit to {case}. Only the highest patch counts, from 1 % on.")
    return "The game forgives much: a patch on the edge of a large finding is a hit. Hence the chance level beside it."


@checks("05.3")
def _by_chance(by_chance: Callable) -> str:
    shares = np.zeros((2, 2, 3))
    shares[0, 0], shares[1, 1] = (0.1, 0.5, 0.005), 0.9
    right = score_maps(np.ones((1, 2, 2, 3)), shares[None])["pointing game by chance"][0]
    found, hits = number(by_chance(shares), "a share of patches"), round(shares.size * right)
    slips = {
        shares.mean(): "That is the share of the volume that the finding fills. A patch filled a little is a hit, too.",
        (shares > 0).mean(): "A patch of which the finding fills less than 1 % is no hit.",
        hits: "That is how many patches would be a hit; divide by how many there are.",
        1 / shares.size: "That would be right if a single patch held the finding; here several do.",
    }
    otherwise = (
        f"Of {shares.size} patches {hits} are filled to 1 % or more, and a blind map has its highest patch anywhere; "
        f"your function says {found:.3f}."
    )
    expect(found, right, slips, otherwise)
    return (
        "A large effusion is hit by chance far more often than a nodule: compare hits with this, finding by finding, "
        "never with zero."
    )
