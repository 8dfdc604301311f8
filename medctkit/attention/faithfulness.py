"""Is a map faithful to the model? Take away what it marks, take away the finding itself, add noise: what happens?

For each region, on the probability of its own finding, the means of several maps beside each other:

- deletion: patches are blurred, those that the map ranks highest first; area under the probability over the share that
  is blurred, lower is better. Insertion: a blurred scan gets its patches back in that order; higher is better. Both are
  those of RISE (Petsiuk et al. 2018, arXiv 1806.07421); one area hangs on what blurring does to any scan, so the order
  of a random map stands beside it.
- counterfactual: the same phantom patient, scanner and noise without the finding. How far does the probability fall,
  and that of the 17 other findings? How much of the map with the finding lies on what changed, and of the same prompt's
  map without it, which knows the place only from elsewhere?
- stability: rank correlation (Spearman) of the map with that after noise. A map that is the same for everybody is
  stable too, so the correlation with the same prompt's map of another study stands beside it.

Quantus (Hedström et al. 2023, JMLR 24(34)) has such measures for batches of one or two spatial axes; three it refuses.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.ndimage import gaussian_filter
from scipy.stats import spearmanr
from torch import nn
from tqdm.auto import tqdm

from medctkit.attention.localisation import CONTRAST, Regions, contrast_map, means_of_findings, score_maps
from medctkit.attention.maps import attend, has_rollout, relevance_maps
from medctkit.cohort.dataset import CTReportDataset
from medctkit.cohort.manifest import has_file, study_from_row
from medctkit.findings import FINDINGS
from medctkit.metrics.bootstrap import interval, patient_weights
from medctkit.scans.preprocessing import preprocess
from medctkit.zero_shot.classifier import ZeroShotClassifier
from medctkit.zero_shot.prompts import Prompts

FRACTIONS = (0.02, 0.05, 0.1, 0.2, 0.5)  # of the patches; 0 and 1 are known for every order
NOISE = 0.03  # standard deviation in the model's input, where 1 is 1,000 HU: that of a scan of a low dose
CHANGE = 0.01  # the least change of a voxel that counts
CHUNK = 10  # volumes in the image encoder
LOWER_IS_BETTER = ("deletion", "likeness to another study")


def some_of_each(regions: Regions, each: int, seed: int = 0) -> Regions:
    """At most `each` of the regions of each finding, drawn from the `seed`."""
    order = np.random.default_rng(seed).permutation(len(regions.finding))
    chosen = [i for k in range(len(FINDINGS)) for i in order[regions.finding[order] == k][:each]]
    return Regions(*(part[chosen] for part in vars(regions).values()))


def curves(
    classifier: ZeroShotClassifier, pixels: torch.Tensor, finding: int, maps: Mapping[str, np.ndarray]
) -> dict[str, tuple[float, float]]:
    """The areas under the curves of deletion and of insertion for each map (t, h, w) of a scan (1, D, H, W).

    `finding` is the column of the `classifier`'s probabilities, from 0 to 1.
    """
    grid = next(iter(maps.values())).shape
    size = [n // g for n, g in zip(pixels.shape[1:], grid, strict=True)]
    blurred = torch.from_numpy(gaussian_filter(pixels.numpy(), (0, *size)))
    volumes = [pixels, blurred]
    for values in maps.values():
        order = np.argsort(-values, axis=None, kind="stable")
        for fraction in FRACTIONS:
            marked = np.zeros(values.size, bool)
            marked[order[: max(1, round(fraction * values.size))]] = True
            voxels = torch.from_numpy(np.kron(marked.reshape(grid), np.ones(size, bool)))
            volumes += [torch.where(voxels, blurred, pixels), torch.where(voxels, pixels, blurred)]
    scores = np.concatenate([classifier.scores(part)[:, finding] for part in torch.stack(volumes).split(CHUNK)])
    whole, none = scores[:2]
    steps, found = np.array([0, *FRACTIONS, 1]), {}
    for name, between in zip(maps, scores[2:].reshape(len(maps), len(FRACTIONS), 2), strict=True):
        deleted, inserted = (
            [first, *between[:, i], last] for i, (first, last) in enumerate([(whole, none), (none, whole)])
        )
        found[name] = float(np.trapezoid(deleted, steps)), float(np.trapezoid(inserted, steps))
    return found


def faithfulness(
    model: nn.Module,
    tokenizer: Any,
    dataset: CTReportDataset,
    regions: Regions,
    prompts: Prompts = "paper",
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """All measures of each region: a row for each, columns "measure: map"; NaN where a measure has no value.

    The arguments are those of `relevance_of_regions`; `seed` draws the random map, the other prompt, the other study
    and the noise. A real scan has no counterfactual.
    """
    classifier, rng, rows = ZeroShotClassifier(model, tokenizer, prompts), np.random.default_rng(seed), []
    stating, denying = classifier.text_embeds()

    def maps_of(pixels: torch.Tensor, asked: Sequence[int]) -> dict[str, np.ndarray]:
        relevant = relevance_maps(model, pixels[None], (stating - denying)[None, list(asked)])[0]
        found = dict(zip(("relevance", "another prompt"), relevant, strict=False))
        rollout = {"rollout": attend(model, pixels).rollout()} if has_rollout(model) else {}
        return found | rollout | {CONTRAST: contrast_map(pixels, relevant[0].shape)}

    whole = zip(regions.study, regions.finding, strict=True)
    for study, k in tqdm(whole, total=len(regions.study), desc="faithfulness", disable=not progress):
        pixels, others = dataset[study]["pixel_values"], np.flatnonzero(np.arange(len(FINDINGS)) != k)
        here = maps_of(pixels, [k, rng.choice(others)])
        here["random"] = rng.random(here["relevance"].shape)
        noisy = (pixels + NOISE * torch.from_numpy(rng.standard_normal(pixels.shape, np.float32))).clamp(-1, 1)
        elsewhere = dataset[rng.choice(regions.study[regions.study != study])]["pixel_values"]
        row: dict[str, float] = {}
        for name, areas in curves(classifier, pixels, k, here).items():
            row |= {f"{measure}: {name}": area for measure, area in zip(("deletion", "insertion"), areas, strict=True)}
        for measure, pictured in (("stability under noise", noisy), ("likeness to another study", elsewhere)):
            for name, there in maps_of(pictured, [k]).items():
                row[f"{measure}: {name}"] = spearmanr(here[name], there, axis=None).statistic
        if not has_file(dataset.rows[study]):
            without = study_from_row(dataset.rows[study] | {FINDINGS[k]: 0}).volume
            twin = preprocess(without, dataset.config)
            fall = classifier.scores(pixels[None])[0] - classifier.scores(twin[None])[0]
            falls = {"own finding": fall[k], f"{len(others)} others": fall[others].mean()}
            row |= {f"fall of the probability: {of}": value for of, value in falls.items()}
            changed = ((pixels - twin).abs() > CHANGE).float()
            size = tuple(n // g for n, g in zip(pixels.shape[1:], here["relevance"].shape, strict=True))
            shares = nn.functional.avg_pool3d(changed[None], size)[0, 0].numpy()
            if shares.max() > 0:
                without_it = {"the same without the finding": maps_of(twin, [k])["relevance"]}
                here = {"relevance": here["relevance"]} | without_it | here
                held = score_maps(np.stack(list(here.values())), np.repeat(shares[None], len(here), axis=0))
                row |= {f"mass on what changed: {n}": v for n, v in zip(here, held["in-mask mass"], strict=True)}
                row["mass on what changed: chance"] = float(shares.mean())
        rows.append(row)
    return pd.DataFrame(rows)


def faithfulness_table(regions: Regions, values: pd.DataFrame, resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Means over findings of the `values` of `faithfulness`, with 95 % intervals from a bootstrap over patients.

    Columns: measure, map, value, low, high; and of the measure's first map minus this one, paired: difference,
    difference_low, difference_high, NaN for the first.
    """
    weights, rows = patient_weights(regions.patients, resamples, seed), []
    split = [name.split(": ", 1) for name in values]
    for measure in dict.fromkeys(measure for measure, _ in split):
        draws = {
            of: means_of_findings(values[f"{measure}: {of}"].to_numpy(float), regions, weights)[:, -1]
            for m, of in split
            if m == measure
        }
        first = next(iter(draws.values()))
        for name, drawn in draws.items():
            less = first - drawn if drawn is not first else drawn * np.nan
            row = {"measure": measure, "map": name, "regions": int(values[f"{measure}: {name}"].notna().sum())}
            for column, prefix, of in (("value", "", drawn), ("difference", "difference_", less)):
                low, high = interval(of[:, None])[:, 0]
                row |= {column: of[0], f"{prefix}low": low, f"{prefix}high": high}
            rows.append(row)
    return pd.DataFrame(rows)
