"""What else might bridge two hospitals, beside training the model: free fixes, and rivals that use the same labels.

A *free fix* knows no label of the target hospital: it moves the scan, its Hounsfield units, the embeddings or the
prompts, and asks the base model as before. A *rival* learns from the labels (or reports) that LoRA learns from, but
leaves the base model alone, or does without it. What a rival may choose, validation studies choose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import Dataset, Subset

from medctkit.findings import FINDINGS
from medctkit.training.objectives import report_prompts
from medctkit.zero_shot.classifier import ZeroShotClassifier, evaluating
from medctkit.zero_shot.prompts import Prompts
from medctkit.zero_shot.retrieval import embed_reports

if TYPE_CHECKING:
    from medctkit.experiments.compare.runs import Data

LUNG = (-950, -500)  # HU of air-filled lung, and of little else
BANDS = (-1000, -950, -900, -850, -700, -500, -200, -50, 30, 70, 150, 300, 600, 1001)  # HU
BOXES = 4  # along each axis
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  # scikit-learn's C
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1000.0)  # of features with a standard deviation of 1
LEVELS = np.linspace(0, 1, 65)  # quantiles


@dataclass(frozen=True)
class Scored:
    """What a rival found.

    Attributes:
        valid, test: (n, 18) probabilities, or what orders as they do; 0.5 throughout for findings in `one_class`.
        trained: numbers it learnt from the labelled studies.
        one_class: findings of which the training studies hold one class only.
    """

    valid: np.ndarray
    test: np.ndarray
    trained: int = 0
    one_class: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rival:
    """A free fix, or a way to learn from the same labels.

    Attributes:
        label: in tables and figures.
        does: a sentence.
        source: where it comes from.
        free: it needs no label of the target hospital.
        score: takes the studies, and which of the training studies it may learn from.
    """

    label: str
    does: str
    source: str
    free: bool
    score: Callable[[Data, Sequence[int]], Scored]


# --- free fixes -----------------------------------------------------------------------------------------


def lung_centroid(volumes: torch.Tensor) -> torch.Tensor:
    """Centre (b, 3) of the air-filled lung in volumes (b, 1, d, h, w) of HU / 1,000, in voxels along (d, h, w)."""
    low, high = (end / 1000 for end in LUNG)
    lung = ((volumes > low) & (volumes < high))[:, 0].float()
    weight = lung.sum(dim=(1, 2, 3)).clamp(min=1)
    places = [torch.arange(n, dtype=torch.float32) for n in lung.shape[1:]]
    others = ((2, 3), (1, 3), (1, 2))
    return torch.stack([(lung.sum(o) * p).sum(1) / weight for p, o in zip(places, others, strict=True)], dim=1)


def registered(volumes: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """Volumes (b, 1, d, h, w), each moved by whole voxels to bring its lung's centre to `centre` (3,); air comes in."""
    out = torch.full_like(volumes, -1.0)
    moves = (centre - lung_centroid(volumes)).round().int().tolist()
    for volume, to, each in zip(volumes[:, 0], out[:, 0], moves, strict=True):
        sizes = list(zip(volume.shape, each, strict=True))
        there = tuple(slice(max(0, m), n + min(0, m)) for n, m in sizes)
        here = tuple(slice(max(0, -m), n + min(0, -m)) for n, m in sizes)
        to[there] = volume[here]
    return out


def body_quantiles(volumes: torch.Tensor) -> np.ndarray:
    """Mean quantiles (65,) of what is denser than air in volumes (b, 1, d, h, w) of HU / 1,000."""
    return np.mean([np.quantile(v[v > LUNG[0] / 1000].numpy(), LEVELS) for v in volumes], axis=0)


def matched(volumes: torch.Tensor, quantiles: np.ndarray) -> torch.Tensor:
    """Volumes (b, 1, d, h, w) with the HU of each mapped, so that its quantiles within the body are `quantiles`."""
    out = volumes.clone()
    for volume in out:
        body = volume > LUNG[0] / 1000
        own = np.maximum.accumulate(np.quantile(volume[body].numpy(), LEVELS) + np.arange(len(LEVELS)) * 1e-7)
        volume[body] = torch.from_numpy(np.interp(volume[body].numpy(), own, quantiles)).float()
    return out


def recentred(embeddings: torch.Tensor, of: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
    """Embeddings (n, p) moved from the mean of `of` (m, p) to the mean of `to` (k, p), of unit length."""
    return F.normalize(embeddings - of.mean(0) + to.mean(0), dim=-1)


def coral(embeddings: torch.Tensor, of: torch.Tensor, to: torch.Tensor, shrink: float = 0.1) -> torch.Tensor:
    """Embeddings (n, p) whitened by mean and covariance of `of` (m, p) and coloured by those of `to` (k, p).

    Correlation alignment (Sun et al. 2016, arXiv 1511.05547); `shrink` of each covariance is its mean variance.
    """

    def power(seen: torch.Tensor, exponent: float) -> torch.Tensor:
        covariance = torch.cov(seen.double().T)
        mean = covariance.trace() / len(covariance)
        values, vectors = torch.linalg.eigh((1 - shrink) * covariance + shrink * mean * torch.eye(len(covariance)))
        return vectors @ torch.diag(values**exponent) @ vectors.T

    aligned = (embeddings - of.mean(0)).double() @ power(of, -0.5) @ power(to, 0.5)
    return F.normalize(aligned.float() + to.mean(0), dim=-1)


def _asked(data: Data, seen: Iterable[torch.Tensor], prompts: Prompts = "paper") -> Scored:
    """What the base model says of the embeddings of validation and test studies."""
    ask = ZeroShotClassifier(data.mini.model, data.mini.tokenizer, prompts).scores_from_embeddings
    valid, test = map(ask, seen)
    return Scored(valid, test)


def _embed(data: Data, dataset: Dataset, change: Callable[[Data, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Embeddings (n, p) of the studies' volumes after a change."""
    with evaluating(data.mini.model):
        return torch.cat([data.mini.model.encode_image(change(data, volumes)) for volumes in batches(dataset)])


def batches(dataset: Dataset, size: int = 32) -> Iterator[torch.Tensor]:
    """The volumes of a data set, some (b, 1, d, h, w) at a time."""
    for part in torch.arange(len(dataset)).split(size):  # type: ignore[arg-type]
        yield torch.stack([dataset[int(i)]["pixel_values"] for i in part])


def _by_volume(change: Callable[[Data, torch.Tensor], torch.Tensor]) -> Callable[[Data, Sequence[int]], Scored]:
    """A fix that changes volumes; the data says what they are at home."""
    return lambda data, _: _asked(data, (_embed(data, d, change) for d in (data.valid, data.test)))


def _by_embedding(align: Callable[..., torch.Tensor]) -> Callable[[Data, Sequence[int]], Scored]:
    """A fix that moves the target hospital's embeddings onto those of home."""

    def score(data: Data, studies: Sequence[int]) -> Scored:
        of, to = data.embedded("train").embeddings[list(studies)], data.embedded("home").embeddings
        return _asked(data, (align(data.embedded(s).embeddings, of, to) for s in ("valid", "test")))

    return score


def _by_prompts(prompts: Callable[[], Prompts]) -> Callable[[Data, Sequence[int]], Scored]:
    return lambda data, _: _asked(data, (data.embedded(s).embeddings for s in ("valid", "test")), prompts())


def _wording() -> Prompts:
    return {name: [list(side) for side in sides] for name, sides in report_prompts("target").items()}


def _all_free(data: Data, studies: Sequence[int]) -> Scored:
    def change(data: Data, volumes: torch.Tensor) -> torch.Tensor:
        return matched(registered(volumes, data.centre), data.quantiles)

    train, valid, test = (_embed(data, d, change) for d in (Subset(data.train, studies), data.valid, data.test))
    home = data.embedded("home").embeddings
    return _asked(data, (recentred(each, train, home) for each in (valid, test)), "ensemble")


# --- rivals that use the same labels -------------------------------------------------------------------


def hu_boxes(volumes: torch.Tensor) -> np.ndarray:
    """Shares of `BANDS` of HU in `BOXES` x `BOXES` x `BOXES` boxes: (b, 1, d, h, w) -> (b, bands * boxes)."""
    edges = torch.tensor(BANDS[1:-1]) / 1000
    band = torch.bucketize(volumes[:, 0].contiguous(), edges)  # (b, d, h, w)
    shares = F.one_hot(band, len(BANDS) - 1).permute(0, 4, 1, 2, 3).float()
    return F.adaptive_avg_pool3d(shares, BOXES).flatten(1).numpy()


def logistic(
    train: np.ndarray, labels: np.ndarray, valid: np.ndarray, valid_labels: np.ndarray, test: np.ndarray
) -> tuple[Scored, float, float]:
    """A logistic regression for each finding on standardised features (n, k).

    Returns:
        Its probabilities; scikit-learn's C, one for all findings, which the validation studies chose from `STRENGTHS`
        (of equals the lowest); their mean AUROC.

    Raises:
        ValueError: no finding has both classes in `valid_labels`.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(train)
    x, *seen = (scaler.transform(split) for split in (train, valid, test))
    both = [k for k in range(len(FINDINGS)) if 0 < labels[:, k].mean() < 1]
    judged = [k for k in range(len(FINDINGS)) if 0 < valid_labels[:, k].mean() < 1]
    if not judged:
        raise ValueError("no finding has both positive and negative studies in the validation data")
    one_class = tuple(name for k, name in enumerate(FINDINGS) if k not in both)
    found = []
    for strength in STRENGTHS:
        scores = [np.full((len(split), len(FINDINGS)), 0.5) for split in seen]
        for k in both:
            model = LogisticRegression(C=strength, max_iter=2000).fit(x, labels[:, k])
            for split, out in zip(seen, scores, strict=True):
                out[:, k] = model.predict_proba(split)[:, 1]
        auroc = float(np.mean([roc_auc_score(valid_labels[:, k], scores[0][:, k]) for k in judged]))
        trained = len(both) * (train.shape[1] + 1)
        found.append((Scored(scores[0], scores[1], trained, one_class), strength, auroc))
    return max(found, key=lambda each: each[2])


def _on_features(features: Callable[[Data, str], np.ndarray]) -> Callable[[Data, Sequence[int]], Scored]:
    def score(data: Data, studies: Sequence[int]) -> Scored:
        chosen = list(studies)
        seen, judge = data.embedded("train"), data.embedded("valid")
        of = {split: features(data, split) for split in ("train", "valid", "test")}
        return logistic(of["train"][chosen], seen.labels[chosen], of["valid"], judge.labels, of["test"])[0]

    return score


def _boxes_of(data: Data, split: str) -> np.ndarray:
    return np.concatenate([hu_boxes(volumes) for volumes in batches(getattr(data, split), 16)])


def ridge_map(images: torch.Tensor, texts: torch.Tensor, strength: float) -> torch.Tensor:
    """The matrix (p, p) that maps image embeddings (n, p) to text embeddings (n, p): ridge regression, closed form."""
    x = images.double()
    scale = x.pow(2).sum() / x.shape[1]  # of one feature, so that strengths do not depend on n
    gram = x.T @ x + strength * 1e-3 * scale * torch.eye(x.shape[1])
    return torch.linalg.solve(gram, x.T @ texts.double()).float()


def _ridge(data: Data, studies: Sequence[int]) -> Scored:
    """Each volume has to find the embedding of its own report; validation AUROC chooses the strength."""
    from sklearn.metrics import roc_auc_score

    chosen, of = list(studies), {s: data.embedded(s).embeddings for s in ("train", "valid", "test")}
    rows = [data.train.rows[i] for i in chosen]
    texts = embed_reports(data.mini.model, data.mini.tokenizer, rows, progress=False).embeddings
    home = {s: of[s] - of["train"].mean(0) for s in of}
    labels = data.embedded("valid").labels
    judged = [k for k in range(len(FINDINGS)) if 0 < labels[:, k].mean() < 1]
    found = []
    for strength in RIDGES:
        matrix = ridge_map(home["train"][chosen], texts - texts.mean(0), strength)
        mapped = (F.normalize(home[s] @ matrix, dim=-1) for s in ("valid", "test"))
        scored = _asked(data, mapped)
        auroc = np.mean([roc_auc_score(labels[:, k], scored.valid[:, k]) for k in judged])
        found.append((auroc, -strength, Scored(scored.valid, scored.test, matrix.numel())))
    return max(found, key=lambda each: each[:2])[2]


RIVALS: dict[str, Rival] = {
    "registration": Rival(
        "registration", "Each scan moved so that the centre of its lungs lies where it lies at home.", "", True,
        _by_volume(lambda data, v: registered(v, data.centre)),
    ),
    "intensities": Rival(
        "intensity matching", "Quantiles of the HU within the body mapped to those of home.",
        "Nyul and Udupa 1999, Magn Reson Med 42:1072", True, _by_volume(lambda data, v: matched(v, data.quantiles)),
    ),
    "recentring": Rival(
        "re-centred embeddings", "The mean of the hospital's embeddings moved to that of home.", "", True,
        _by_embedding(recentred),
    ),
    "coral": Rival(
        "CORAL", "Mean and covariance of the hospital's embeddings made those of home.",
        "Sun et al. 2016, arXiv 1511.05547", True, _by_embedding(coral),
    ),
    "ensemble": Rival(
        "prompt ensemble", "Eight wordings of each prompt, averaged.", "Radford et al. 2021, arXiv 2103.00020", True,
        _by_prompts(lambda: "ensemble"),
    ),
    "wording": Rival(
        "the hospital's wording", "Prompts in the sentences of the hospital's own reports.", "", True,
        _by_prompts(_wording),
    ),
    "all-free": Rival(
        "free fixes together", "Registration, intensity matching, re-centring and the prompt ensemble.", "", True,
        _all_free,
    ),
    "hu-boxes": Rival(
        "HU in boxes", "Logistic regression on shares of HU bands in 4 x 4 x 4 boxes; no neural network.", "", False,
        _on_features(_boxes_of),
    ),
    "linear-probe": Rival(
        "linear probe", "18 logistic regressions on frozen image embeddings. Not zero-shot: it knows 18 answers only.",
        "Alain and Bengio 2016, arXiv 1610.01644", False,
        _on_features(lambda data, split: data.embedded(split).embeddings.numpy()),
    ),
    "ridge": Rival(
        "ridge", "One matrix between the frozen encoders, in closed form: volumes to the embeddings of their reports.",
        "", False, _ridge,
    ),
}  # fmt: skip
