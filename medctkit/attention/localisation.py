"""Is attention right? Maps of a model against masks: of phantoms, which know where each finding is, and of LIDC-IDRI.

Everything is counted in patches, the grain of the model: of each patch the mask fills a share. Three scores for a map
and a mask, each with the value that a map without any knowledge has on average ("chance"):

- pointing game (Zhang et al. 2016, arXiv 1608.00507): does the highest patch hold part of the finding?
- AUPRC: average precision of the map as a detector of voxels in the mask; every voxel of a patch scores alike.
- in-mask mass: the share of the map that lies inside the mask.

Two controls show what a good score is worth: a map that knows neither model nor prompt (the local contrast of the scan,
smoothed), and the maps of the 17 other findings' prompts. The sanity check shuffles weights, after which a map that
explains the model must be another map (Adebayo et al. 2018, arXiv 1810.03292).
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.ndimage import gaussian_gradient_magnitude
from scipy.stats import rankdata
from torch import nn
from tqdm.auto import tqdm

from medctkit.attention.maps import attend, has_rollout, relevance_maps
from medctkit.cohort.dataset import CTReportDataset
from medctkit.cohort.nodules import known_masks
from medctkit.findings import FINDINGS
from medctkit.metrics.bootstrap import interval, patient_weights, weighted_means
from medctkit.model.protocol import Model
from medctkit.scans.preprocessing import HU_LIMIT, PreprocessConfig, preprocess
from medctkit.scans.volumes import CTVolume
from medctkit.zero_shot.classifier import ZeroShotClassifier
from medctkit.zero_shot.prompts import Prompts

SCORES = ("pointing game", "AUPRC", "in-mask mass")
CONTRAST = "smoothed contrast"
PART_OF_A_PATCH = 0.01  # the least share of a patch that counts as holding a finding; or the largest share, if less
AT_A_TIME = 8  # volumes of the mini model in one backward pass


@dataclass(frozen=True)
class Regions:
    """Where findings are: one entry for each finding of each study."""

    study: np.ndarray  # (m,) index of the study in the data set
    finding: np.ndarray  # (m,) index into FINDINGS
    patients: np.ndarray  # (m,) names
    shares: np.ndarray  # (m, t, h, w) how much of each patch the mask fills, 0 to 1


def patch_shares(
    mask: np.ndarray, volume: CTVolume, preprocess_config: PreprocessConfig, grid: Sequence[int]
) -> np.ndarray:
    """How much of each patch a mask fills: (t, h, w), 0 to 1; the mask goes the way of the scan.

    Raises:
        ValueError: a mask of another shape than the volume.
    """
    if np.shape(mask) != volume.shape:
        raise ValueError(f"the mask has shape {np.shape(mask)}, the volume {volume.shape}: they must be the same")
    filled = CTVolume(np.asarray(mask, np.float32) * HU_LIMIT, volume.spacing, volume.orientation, volume.affine)
    seen = preprocess(filled, preprocess_config, check=False).clamp(min=0)  # -1 where the scan ends before the model
    size = tuple(n // g for n, g in zip(preprocess_config.shape, grid, strict=True))
    return nn.functional.avg_pool3d(seen[None], size)[0, 0].numpy()


def find_regions(
    rows: Sequence[Mapping], preprocess_config: PreprocessConfig, grid: Sequence[int], progress: bool = True
) -> Regions:
    """The masks of phantoms and of scans with `masks`, by their rows of a manifest, on a `grid` of patches (t, h, w).

    Raises:
        ValueError: a row of a real scan without masks; no finding at all.
    """
    found = []
    for index, row in enumerate(tqdm(rows, desc="masks", unit="study", disable=not progress)):
        for name, mask, volume in known_masks(row):
            shares = patch_shares(mask, volume, preprocess_config, grid)
            if name in FINDINGS and shares.max() > 0:  # else it lies outside of what the model sees
                found.append((index, FINDINGS.index(name), row["patient"], shares))
    if not found:
        raise ValueError(f"none of the {len(rows)} studies has a finding that the model sees; there is nothing to find")
    return Regions(*(np.array(part) for part in zip(*found, strict=True)))


def relevance_of_regions(
    model: nn.Module,
    tokenizer: Any,
    dataset: CTReportDataset,
    regions: Regions,
    prompts: Prompts = "paper",
    every: bool = False,
    progress: bool = True,
) -> np.ndarray:
    """Gradient-weighted relevance of each region's own prompt pair, by `attention.maps.relevance`: (m, t, h, w).

    With `every`, of the pairs of all findings: (m, 18, t, h, w), for `own_and_others`. The `dataset` holds the studies
    of `regions`; the other arguments are those of `ZeroShotClassifier`.
    """
    stating, denying = ZeroShotClassifier(model, tokenizer, prompts).text_embeds()
    directions, studies, of = stating - denying, regions.study, np.arange(len(regions.study))
    if every:  # each study once, for all its regions
        studies, of = np.unique(studies, return_inverse=True)
    found = []
    for start in tqdm(range(0, len(studies), AT_A_TIME), desc="relevance", disable=not progress):
        part = slice(start, start + AT_A_TIME)
        pixels = torch.stack([dataset[i]["pixel_values"] for i in studies[part]])
        asked = directions.expand(len(pixels), -1, -1) if every else directions[regions.finding[part]]
        found.append(relevance_maps(model, pixels, asked))
    return np.concatenate(found)[of]


def own_and_others(every: np.ndarray, regions: Regions) -> tuple[np.ndarray, np.ndarray]:
    """Of maps for `every` finding (m, 18, t, h, w) those of each region's own (m, t, h, w), and the others."""
    own = np.arange(every.shape[1]) == regions.finding[:, None]
    return every[own], every[~own].reshape(len(every), -1, *every.shape[2:])


def rollout_of_regions(model: nn.Module, dataset: CTReportDataset, regions: Regions) -> np.ndarray:
    """Attention rollout of each region's study: (m, t, h, w); the same for all findings of a study."""
    studies, of = np.unique(regions.study, return_inverse=True)
    return np.stack([attend(model, dataset[i]["pixel_values"]).rollout() for i in studies])[of]


def contrast_of_regions(dataset: CTReportDataset, regions: Regions, grid: Sequence[int]) -> np.ndarray:
    """A map without a model: the gradient of the scan, smoothed to the grain of the patches: (m, t, h, w), sum 1."""
    studies, of = np.unique(regions.study, return_inverse=True)
    return np.stack([contrast_map(dataset[i]["pixel_values"], grid) for i in studies])[of]


def contrast_map(pixels: torch.Tensor, grid: Sequence[int]) -> np.ndarray:
    """The gradient of one scan (1, D, H, W), smoothed to a `grid` of patches: (t, h, w), sum 1."""
    edges = torch.from_numpy(gaussian_gradient_magnitude(pixels.numpy(), 1.0, axes=(1, 2, 3)))
    t, h, w = grid
    found = nn.functional.adaptive_avg_pool3d(edges, (t, h, w))[0].numpy()
    return found / found.sum()


def score_maps(maps: np.ndarray, shares: np.ndarray) -> dict[str, np.ndarray]:
    """Each score of `SCORES`, and "<score> by chance", of maps (m, t, h, w) against shares (m, t, h, w): (m,) each.

    Of several maps for each region, (m, c, t, h, w), it is their mean score.

    Raises:
        ValueError: unequal shapes; a map with negative or missing values, or none above 0.
    """
    if maps.ndim == 5:
        several = score_maps(maps.reshape(-1, *maps.shape[2:]), np.repeat(shares, maps.shape[1], axis=0))
        return {name: values.reshape(maps.shape[:2]).mean(1) for name, values in several.items()}
    if maps.shape != shares.shape or maps.ndim != 4:
        raise ValueError(f"maps of shape {maps.shape} and shares of shape {shares.shape}: expected (m, t, h, w) twice")
    maps, shares = (x.reshape(len(x), -1).astype(float) for x in (maps, shares))
    if not (np.isfinite(maps).all() and (maps >= 0).all() and (maps.sum(1) > 0).all()):
        raise ValueError("maps must be finite, not negative, and not all 0")
    held = shares >= np.minimum(PART_OF_A_PATCH, shares.max(1, keepdims=True))
    highest = maps == maps.max(1, keepdims=True)
    # average precision as scikit-learn has it, of all maps at once; a patch is its share of positives, ties one step
    found = np.take_along_axis(shares, np.argsort(-maps, axis=1), axis=1).cumsum(1)  # in the best 1, 2, ... patches
    as_high = rankdata(-maps, "max", axis=1).astype(int)  # how many patches are at least as high as this one
    precision = np.take_along_axis(found, as_high - 1, axis=1) / as_high
    return {
        "pointing game": (held & highest).sum(1) / highest.sum(1),
        "AUPRC": (shares * precision).sum(1) / shares.sum(1),
        "in-mask mass": (maps * shares).sum(1) / maps.sum(1),
        "pointing game by chance": held.mean(1),
        "AUPRC by chance": shares.mean(1),
        "in-mask mass by chance": shares.mean(1),
    }


def localisation_table(
    regions: Regions, maps: Mapping[str, np.ndarray], resamples: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Scores of maps (m, t, h, w) for each finding and their mean, with 95 % intervals from a bootstrap over patients.

    Columns: finding (or "mean"), method (the name of the map), score, value, low, high, chance, regions (how many). For
    two maps of one kind, `paired_difference` says more than two intervals.
    """
    weights, rows = patient_weights(regions.patients, resamples, seed), []
    counts = [*np.bincount(regions.finding, minlength=len(FINDINGS)), len(regions.finding)]
    for name, of_map in maps.items():
        scores = score_maps(of_map, regions.shares)
        for score in SCORES:
            values, chance = (means_of_findings(scores[s], regions, weights) for s in (score, f"{score} by chance"))
            for k, finding in enumerate([*FINDINGS, "mean"]):
                if counts[k]:
                    ends = interval(values[:, k])
                    rows.append((finding, name, score, values[0, k], *ends, chance[0, k], int(counts[k])))
    columns = ["finding", "method", "score", "value", "low", "high", "chance", "regions"]
    return pd.DataFrame(rows, columns=columns)


def paired_difference(
    regions: Regions, first: np.ndarray, second: np.ndarray, resamples: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Second minus first maps (m, t, h, w) on the same regions, mean of findings: score, value, low, high (95 %)."""
    weights, rows = patient_weights(regions.patients, resamples, seed), []
    before, after = score_maps(first, regions.shares), score_maps(second, regions.shares)
    for score in SCORES:
        draws = means_of_findings(after[score] - before[score], regions, weights)[:, -1]
        rows.append((score, draws[0], *interval(draws)))
    return pd.DataFrame(rows, columns=["score", "value", "low", "high"])


def means_of_findings(values: np.ndarray, regions: Regions, weights: np.ndarray) -> np.ndarray:
    """Means of the values (m,) of `regions` for each finding and, last, their mean: (1 + resamples, 19).

    `weights` (m, 1 + resamples) are those of `patient_weights`.
    """
    of_finding = np.arange(len(FINDINGS)) == regions.finding[:, None]  # (m, 18)
    return weighted_means(np.where(of_finding, values[:, None], np.nan), weights)


def shuffled(model: nn.Module, prefixes: Sequence[str], seed: int = 0) -> nn.Module:
    """A copy of a model in which the numbers of each weight under `prefixes` have changed places."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.startswith(tuple(f"{prefix}." for prefix in prefixes)):
                order = torch.randperm(weight.numel(), generator=generator)
                weight.copy_(weight.flatten()[order.to(weight.device)].view(weight.shape))
    return model


def sanity_check(
    model: Model, tokenizer: Any, dataset: CTReportDataset, regions: Regions, seed: int = 0, progress: bool = True
) -> pd.DataFrame:
    """How much of a map is left as weights are shuffled, by the `seed`, from the output down.

    A row for each more part that is shuffled; columns relevance and, where the model has one, rollout: the mean rank
    correlation (Spearman) with the map before, 1 for the same; and "in-mask mass" of the relevance, mean of findings,
    with its chance. The `model` is a plain one (of an adapted one, what `merge_lora` gives); the other arguments are
    those of `relevance_of_regions`.
    """

    def ranks(maps: np.ndarray) -> np.ndarray:
        order = rankdata(maps.reshape(len(maps), -1), axis=1)
        order -= order.mean(1, keepdims=True)
        return order / np.maximum(np.linalg.norm(order, axis=1, keepdims=True), 1e-12)

    prefixes: list[str] = []
    before: dict[str, np.ndarray] = {}
    rows: list[dict[str, str | float]] = []
    for stage, parts in {"nothing": (), **model.parts.stages}.items():
        prefixes += parts
        blind = shuffled(model, prefixes, seed)
        maps = {"relevance": relevance_of_regions(blind, tokenizer, dataset, regions, progress=progress)}
        if has_rollout(blind):
            maps["rollout"] = rollout_of_regions(blind, dataset, regions)
        before = before or {name: ranks(of) for name, of in maps.items()}
        alike = {name: float((ranks(of) * before[name]).sum(1).mean()) for name, of in maps.items()}
        scores, once = score_maps(maps["relevance"], regions.shares), np.ones((len(regions.study), 1))
        columns = ("in-mask mass", "in-mask mass by chance")
        mass = {name: float(means_of_findings(scores[name], regions, once)[0, -1]) for name in columns}
        rows.append({"shuffled": f"{'+ ' if len(rows) > 1 else ''}{stage}", **alike, **mass})
    return pd.DataFrame(rows).set_index("shuffled")
