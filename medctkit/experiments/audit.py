"""The known defects of the public CT-CLIP evaluation: each done both ways, and what that does to the numbers.

`audit` needs scores only, `prompt_mismatch` a model, `audit_scans` a model and scans. What the public
evaluation does was read off the repository ibrahimethemhamamci/CT-CLIP and is done here in our own words; nothing else
in the package works like this.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import compress
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from medctkit.findings import FINDINGS
from medctkit.metrics.bootstrap import interval
from medctkit.metrics.scores import evaluate, mean_auroc, mean_draws, thresholds_from_validation
from medctkit.model.base_model import BaseModel
from medctkit.scans.hounsfield import check_hu
from medctkit.scans.preprocessing import HU_LIMIT, PreprocessConfig, preprocess
from medctkit.scans.volumes import CTVolume
from medctkit.zero_shot.classifier import Embedded, ZeroShotClassifier

REPOSITORY = "repository ibrahimethemhamamci/CT-CLIP"
INTERCEPTS = (-1024.0, -8192.0)  # HU, of CT-RATE's metadata
SHARE_8192 = 850 / 3039  # volumes of CT-RATE's validation split with the second one
WIDTH = ("width of the 95 % interval of the mean AUROC", "of AUROC")
PUBLIC_COLOUR, RIGHT_COLOUR = "#D55E00", "#0072B2"  # Okabe and Ito: the colour-blind can tell them apart
_WHOLE = {"AUROC": 1.0, "accuracy": 1.0, "F1": 1.0, "%": 100.0}  # where the scale of a unit ends

# By defect: what the public evaluation does, what to do instead, why it matters.
DEFECTS: dict[str, dict[str, str]] = json.loads((files("medctkit") / "assets" / "audit.json").read_text("utf-8"))


@dataclass(frozen=True)
class Defect:
    """One number of an evaluation, the public way and the right way.

    `name` is a key of `DEFECTS`; one defect may show in several numbers. `quantity` says what `public` and `right` are.
    """

    name: str
    quantity: str
    unit: str
    public: float
    right: float
    public_way: str
    right_way: str
    why: str
    source: str


@dataclass(frozen=True)
class Answers:
    """What a model said of n studies: labels (n, k), scores (n, k), patients (n,), and the k findings."""

    labels: ArrayLike
    scores: ArrayLike
    patients: ArrayLike
    findings: Sequence[str] = FINDINGS

    def mean(self, thresholds: ArrayLike = 0.5) -> pd.Series:
        """The mean over findings as `evaluate` gives it; few resamples where nobody looks at the interval.

        Raises:
            ValueError: no finding has both classes; those of `metrics.evaluate`.
        """
        table = evaluate(**vars(self), thresholds=thresholds, resamples=20)
        if np.isnan(table.loc["mean", "auroc"]):
            raise ValueError("no finding has both positive and negative studies, so nothing can be scored; give more")
        return table.loc["mean"]

    def width(self, resamples: int, seed: int) -> float:
        """Of the 95 % interval of the mean AUROC over findings."""
        return float(np.ptp(interval(mean_draws(**vars(self), resamples=resamples, seed=seed))))


# --- defects that scores alone show ----------------------------------------------------------------------


def unused_bootstrap(test: Answers, resamples: int = 1000, seed: int = 0) -> list[Defect]:
    """Resamples that are drawn and never used, so that all give one value, against a bootstrap over patients."""
    return _defects("unused bootstrap", (*WIDTH, 0, test.width(resamples, seed)))


def thresholds_on_test(test: Answers, valid: Answers) -> list[Defect]:
    """Thresholds chosen on the test labels, against those from validation; over findings with both classes in both.

    Nothing, where there is no such finding.
    """
    test.mean()
    try:
        honest = thresholds_from_validation(valid.labels, valid.scores, valid.findings)
    except ValueError as error:
        raise ValueError(f"validation studies: {error}") from error
    both = _both_classes(test.labels) & _both_classes(valid.labels)
    if not both.any():
        return []
    labels, scores = np.asarray(test.labels, float)[:, both], np.asarray(test.scores, float)[:, both]
    judged = Answers(labels, scores, test.patients, list(compress(test.findings, both)))
    public, right = (judged.mean(limits) for limits in ("roc-corner-on-test", honest[both]))
    return _defects(
        "thresholds chosen on the test labels",
        ("balanced accuracy", "accuracy", public["balanced_accuracy"], right["balanced_accuracy"]),
        ("accuracy", "accuracy", public["accuracy"], right["accuracy"]),
        ("F1 of the positive class", "F1", public["f1"], right["f1"]),
    )


def thresholds_on_noise(studies: int = 100, prevalence: float = 0.1, repeats: int = 500, seed: int = 0) -> list[Defect]:
    """The same where there is nothing to find: random scores, whose balanced accuracy is 0.5 whatever the threshold.

    Simulates `studies` for test and as many for validation, a share of `prevalence` positive, `repeats` times.
    """
    positives, names = round(studies * prevalence), [str(i) for i in range(repeats)]
    sick = np.arange(studies) < positives
    labels = np.tile(sick.astype(float)[:, None], repeats)
    test, valid = np.random.default_rng(seed).random((2, studies, repeats))
    said = (test >= thresholds_from_validation(labels, chosen_on, names) for chosen_on in (test, valid))
    public, right = ((yes[sick].mean() + 1 - yes[~sick].mean()) / 2 for yes in said)
    quantity = f"balanced accuracy of random scores, {positives} of {studies} studies positive"
    source = f"{REPOSITORY}; simulation, seed {seed}, mean of {repeats}"
    return _defects("thresholds chosen on the test labels", (quantity, "accuracy", public, right), source=source)


def f1_weighted_by_class(test: Answers, thresholds: ArrayLike = 0.5) -> list[Defect]:
    """Weighted F1 against the F1 of the positive class, of the same answers; and of a model that always says no.

    Weighted F1 is the mean of the F1 of "absent" and of "present", each weighted by how many studies it has.
    """
    silent = replace(test, scores=np.zeros(np.shape(test.labels)))
    means = {"of these answers": test.mean(thresholds), "of a model that always says no": silent.mean()}
    numbers = ((f"mean F1 {of}", "F1", mean["weighted_f1"], mean["f1"]) for of, mean in means.items())
    return _defects("weighted F1", *numbers)


def counted_by_volume(test: Answers, reconstructions: int = 2, resamples: int = 1000, seed: int = 0) -> list[Defect]:
    """Volumes counted as if each were another patient, against patients.

    Each row is repeated `reconstructions` times, as the reconstructions of a scan repeat its labels and very nearly its
    scores (CT-RATE has about two for each scan); 1: the rows are volumes already.
    """
    given = (test.labels, test.scores, test.patients)
    labels, scores, patients = (np.repeat(np.asarray(a), reconstructions, axis=0) for a in given)
    counted = [Answers(labels, scores, cases, test.findings) for cases in (np.arange(len(labels)), patients)]
    widths = (each.width(resamples, seed) for each in counted)
    cases = ("independent cases", "cases", *(len(np.unique(each.patients)) for each in counted))
    return _defects("volumes counted as patients", cases, (*WIDTH, *widths))


def audit(test: Answers, valid: Answers, resamples: int = 1000, seed: int = 0) -> list[Defect]:
    """All defects that scores alone show."""
    on_test = thresholds_on_test(test, valid)
    limits = thresholds_from_validation(valid.labels, valid.scores, valid.findings)
    return [
        *unused_bootstrap(test, resamples, seed),
        *on_test,
        *thresholds_on_noise(seed=seed),
        *f1_weighted_by_class(test, limits),
        *counted_by_volume(test, resamples=resamples, seed=seed),
    ]


# --- defects that take a model, or scans -----------------------------------------------------------------


def prompt_mismatch(
    base: BaseModel, test: Embedded, asked: str = "paper", trained: str = "training-style"
) -> list[Defect]:
    """Prompts worded otherwise than in training, against those of training; image embeddings are the same.

    For `asked` (evaluation) and `trained` (training) see `medctkit.zero_shot.prompts.prompt_sentences`.
    """
    found = []
    for prompts in (asked, trained):
        scores = ZeroShotClassifier(base.model, base.tokenizer, prompts).scores_from_embeddings(test.embeddings)
        found.append((mean_auroc(test.labels, scores), 100 * np.mean(scores >= 0.5)))
    numbers = zip(("mean AUROC", "answers of 0.5 and above"), ("AUROC", "%"), *found, strict=True)
    return _defects("prompts other than in training", *numbers)


def rescaled_again(volume: CTVolume, intercept: float) -> CTVolume:
    """A scan in HU with slope 1 and intercept applied once more, on purpose: `read_volume` refuses to do it."""
    return replace(volume, hu=volume.hu.astype(np.float32) + np.float32(intercept))


def clipped_after_resizing(volume: CTVolume, config: PreprocessConfig) -> torch.Tensor:
    """Model input (1, z, x, y) as `preprocess` makes it, but with HU clipped after resampling, not before.

    Resampling is linear: scaled down (by a power of two, exact) until nothing is clipped, and scaled up afterwards.
    """
    hu = volume.hu.astype(np.float32)
    scale = 2.0 ** max(0, np.frexp(np.abs(hu).max() / HU_LIMIT)[1])
    return (preprocess(replace(volume, hu=hu / np.float32(scale)), config, check=False) * scale).clamp_(-1, 1)


def scans_prepared_otherwise(
    base: BaseModel, volumes: Sequence[CTVolume], labels: ArrayLike, seed: int = 0
) -> list[Defect]:
    """Scans rescaled a second time, and clipped after resampling, against scans read and prepared in one right way.

    Rescaled: slope 1 and an intercept of CT-RATE's metadata applied to scans that are in HU already. The public way
    checks nothing, so all spoiled scans reach the model; the right way those that `check_hu` lets pass.

    Clipped: after resampling in training and before it in evaluation. The right way's difference of 0 is no
    measurement: there is one path, so nothing to differ.

    `volumes` are n scans in HU, or a sequence that reads them one by one; `labels` (n, 18), NaN where unknown; `seed`
    draws which scans have which intercept. Nothing is returned where no finding has both classes in them.
    """
    labels = np.asarray(labels, float)
    if not _both_classes(labels).any():
        return []
    classifier, config, n = ZeroShotClassifier(base.model, base.tokenizer), base.preprocess_config, len(volumes)
    scores, floor = np.empty((2 + len(INTERCEPTS), n, len(FINDINGS))), np.empty((1 + len(INTERCEPTS), n))
    passed, off = np.zeros((len(INTERCEPTS), n)), np.empty((n, 2))
    for i in range(n):
        volume = volumes[i]
        spoiled = [rescaled_again(volume, intercept) for intercept in INTERCEPTS]
        right, *ways = (preprocess(scan, config, check=False) for scan in (volume, *spoiled))
        late = clipped_after_resizing(volume, config)
        # one at a time: in batches of unequal size even equal volumes differ in their last digits
        scores[:, i] = [classifier.scores(inputs[None])[0] for inputs in (right, *ways, late)]
        floor[:, i] = [100 * (inputs == -1).float().mean().item() for inputs in (right, *ways)]
        for way, scan in enumerate(spoiled):
            with suppress(ValueError):
                check_hu(scan.hu)
                passed[way, i] = 100
        difference = HU_LIMIT * (late - right).abs()
        off[i] = difference.max().item(), difference.mean().item()
    rare = np.random.default_rng(seed).permutation(n) < round(SHARE_8192 * n)
    mixed = np.where(rare[:, None], scores[2], scores[1])
    auroc, *public, clipped = (mean_auroc(labels, found) for found in (*scores[:-1], mixed, scores[-1]))
    texts = (*(f"intercept {i:g}" for i in INTERCEPTS), "both intercepts as often as in CT-RATE")
    scans, lowest = f"mean AUROC of {n} scans", floor.mean(1)
    rescaled = _defects(
        "rescaled twice",
        *((f"voxels at the lowest value, {texts[k]}", "%", lowest[1 + k], lowest[0]) for k in (0, 1)),
        *((f"{scans}, {text}", "AUROC", spoilt, auroc) for text, spoilt in zip(texts, public, strict=True)),
        ("spoiled scans that reach the model", "%", 100, passed.mean()),
        source=f"{REPOSITORY}, issue 50",
    )
    return rescaled + _defects(
        "clipped after or before resizing",
        ("largest difference between training and evaluation", "HU", off[:, 0].max(), 0),
        ("mean difference between training and evaluation", "HU", off[:, 1].mean(), 0),
        (f"{scans}, clipped after or before", "AUROC", clipped, auroc),
    )


def encoder_per_finding(base: BaseModel, volume: CTVolume) -> list[Defect]:
    """Forward passes of the vision encoder for one volume (HU): one for each finding, against one for all."""
    inputs, counts = preprocess(volume, base.preprocess_config)[None], []
    for groups in ([[name] for name in FINDINGS], [FINDINGS]):
        passes: list[int] = []
        with base.model.vision_encoder.register_forward_hook(lambda *_, seen=passes: seen.append(1)):
            for names in groups:
                ZeroShotClassifier(base.model, base.tokenizer, findings=names).scores(inputs)
        counts.append(len(passes))
    numbers = ("passes of the vision encoder for one volume", "passes", *counts)
    return _defects("a pass of the encoder for each finding", numbers)


def audit_scans(base: BaseModel, volumes: Any, labels: ArrayLike, seed: int = 0) -> list[Defect]:
    """All defects that take scans; there may be fewer volumes than labels. See `scans_prepared_otherwise`."""
    otherwise = scans_prepared_otherwise(base, volumes, np.asarray(labels)[: len(volumes)], seed)
    return otherwise + encoder_per_finding(base, volumes[0])


def audit_figure(defects: Sequence[Defect]) -> Figure:
    """Each number the public way and the right way, one above the other, each on its own scale."""
    figure = Figure(figsize=(11, 1 + 0.6 * len(defects)), layout="constrained")
    rows = figure.subplots(len(defects), 1, squeeze=False)[:, 0]
    right = dict(marker="o", s=95, facecolor="none", edgecolor=RIGHT_COLOUR, label="the right way")
    public = dict(marker="x", s=45, color=PUBLIC_COLOUR, label="the public way")
    for axes, defect, before in zip(rows, defects, [None, *defects[:-1]], strict=True):
        if before is None or defect.name != before.name:
            axes.set_title(defect.name, loc="left", fontsize=10, fontweight="bold")
        end = _WHOLE.get(defect.unit) or 1.1 * max(defect.public, defect.right) or 1.0
        axes.plot([defect.public, defect.right], [0, 0], color="#999999", linewidth=1.5, zorder=1)
        for value, mark in ((defect.right, right), (defect.public, public)):
            axes.scatter(value, 0, zorder=2, clip_on=False, linewidth=2, **mark)
        axes.set(xlim=(0, end), ylim=(-1, 1))
        axes.locator_params(axis="x", nbins=5)
        axes.set_yticks([0], [defect.quantity.replace(", ", ",\n", 1)], fontsize=9)
        axes.tick_params(axis="x", labelsize=7)
        axes.tick_params(axis="y", length=0, pad=10)
        axes.spines[["top", "right", "left"]].set_visible(False)
        form = ".3f" if end <= 1 else ".0f" if (defect.public + defect.right) % 1 == 0 else ".1f"
        texts = (f"{defect.public:{form}}", f"{defect.right:{form}}", defect.unit)
        for x, text, colour in zip((16, 62, 108), texts, (PUBLIC_COLOUR, RIGHT_COLOUR, "black"), strict=True):
            place = dict(xycoords="axes fraction", xytext=(x, 0), textcoords="offset points", va="center")
            axes.annotate(text, (1, 0.5), color=colour, fontsize=10, **place)
    figure.legend(*rows[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    return figure


def _defects(name: str, *numbers: tuple, source: str = REPOSITORY) -> list[Defect]:
    """Numbers (quantity, unit, public, right) of a defect with what there is to say about it."""
    texts = DEFECTS[name] | {"source": source}
    return [Defect(name, what, unit, float(a), float(b), **texts) for what, unit, a, b in numbers]


def _both_classes(labels: Any) -> np.ndarray:
    return (np.asarray(labels) == 1).any(0) & (np.asarray(labels) == 0).any(0)
