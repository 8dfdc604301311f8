"""What else might bridge two hospitals, beside training the model: free fixes, and rivals that use the same labels.

A *free fix* knows no label of the target hospital: it moves the scan, its Hounsfield units, the embeddings or the
prompts, and asks the base model as before. It needs scans of the target hospital's training studies, and of home no
more than means. A *rival* learns from the labels or reports that LoRA learns from, but leaves the base model alone, or
does without it. What a rival may choose, validation studies choose, as they do for LoRA; test studies choose nothing.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import product
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch.nn import functional as F

from medctkit.experiments.compare.data import Data
from medctkit.experiments.compare.fixes import BANDS, BOXES, LEVELS, coral, hu_boxes, recentred
from medctkit.findings import FINDINGS
from medctkit.metrics.bootstrap import with_both_classes
from medctkit.metrics.scores import mean_auroc
from medctkit.training.objectives import report_prompts
from medctkit.zero_shot.prompts import Prompts
from medctkit.zero_shot.retrieval import embed_reports

STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  # scikit-learn's C
RIDGES = tuple(10.0**k for k in range(-6, 2))  # of the mean squared length of a feature


@dataclass(frozen=True)
class Scored:
    """What a rival found.

    Attributes:
        valid, test: (n, 18) probabilities, or what orders as they do; 0.5 throughout for findings in `one_class`.
        chosen: what validation studies chose, in words.
        trained: numbers it learnt from the labelled studies.
        one_class: findings of which the training studies hold one class only.
    """

    valid: np.ndarray
    test: np.ndarray
    chosen: str = ""
    trained: int = 0
    one_class: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rival:
    """A free fix, or a way to learn from the same labels.

    Attributes:
        label: in tables and figures.
        labels: what it does with the target hospital's labels: "none", "choose" or "learn".
        score: takes the studies, and which of the training studies it may use.
        settings: all that it depends on beside the studies; written into its result.
    """

    label: str
    labels: str
    score: Callable[[Data, Sequence[int]], Scored]
    settings: dict[str, Any] = field(default_factory=dict)


def best(found: Iterable[Scored], labels: np.ndarray) -> Scored:
    """What scores best on validation studies with labels (n, 18); of equals the first."""
    return max(found, key=lambda scored: mean_auroc(labels, scored.valid))


# --- free fixes -----------------------------------------------------------------------------------------

ALIGNED: dict[str, Callable[..., torch.Tensor]] = {"re-centred": recentred, "CORAL": coral}
WORDINGS: dict[str, Callable[[], Prompts]] = {
    "paper": lambda: "paper",
    "ensemble": lambda: "ensemble",
    "home's wording": lambda: report_prompts("source"),
    "the hospital's wording": lambda: report_prompts("target"),
}
_MATCHED = ((), ("intensities",), ("hospital intensities",))
MOVED = [before + then for before in ((), ("registration",)) for then in _MATCHED]


def fixed(
    data: Data, studies: Sequence[int], changes: Sequence[str] = (), aligned: str = "", wording: str = "paper"
) -> Scored:
    """What the base model says after `CHANGES` to the volumes, one of `ALIGNED`, and in one of `WORDINGS`."""
    seen = [data.embedded(split, *changes).embeddings for split in ("valid", "test")]
    if aligned:
        of, to = data.embedded("train", *changes).embeddings[list(studies)], data.embedded("home").embeddings
        seen = [F.normalize(ALIGNED[aligned](each, of, to), dim=-1) for each in seen]
    return _asked(data, seen, wording, " + ".join([*changes, *[aligned] * bool(aligned), wording]))


def _asked(data: Data, seen: Iterable[torch.Tensor], wording: str, chosen: str, trained: int = 0) -> Scored:
    """What the base model's prompts say of the embeddings of validation and test studies."""
    valid, test = map(data.in_words(WORDINGS[wording]).scores_from_embeddings, seen)
    return Scored(valid, test, chosen, trained)


def _best_fixed(data: Data, studies: Sequence[int]) -> Scored:
    every = product(MOVED, ("", *ALIGNED), WORDINGS)
    each = (fixed(data, studies, changes, aligned, wording) for changes, aligned, wording in every)
    return best(each, data.labels("valid"))


def _free(label: str, changes: Sequence[str] = (), aligned: str = "", wording: str = "paper") -> Rival:
    def score(data: Data, studies: Sequence[int]) -> Scored:
        return replace(fixed(data, studies, changes, aligned, wording), chosen="")

    wordings = WORDINGS[wording]()
    said = wordings if isinstance(wordings, str) else sha256(repr(wordings).encode()).hexdigest()[:16]
    settings = {"changes": list(changes), "aligned": aligned, "wording": f"{wording}: {said}"}
    return Rival(label, "none", score, settings | {"quantiles": len(LEVELS)})


# --- rivals that use the same labels -------------------------------------------------------------------


def logistic(
    train: np.ndarray,
    labels: np.ndarray,
    valid: np.ndarray,
    valid_labels: np.ndarray,
    test: np.ndarray,
    strengths: Sequence[float],
) -> Scored:
    """A logistic regression for each finding on standardised features (n, k), one strength for all findings.

    Args:
        train: features of the studies to learn from.
        labels: (n, 18) of theirs; studies whose label is unknown, NaN, are left out, finding by finding.
        valid: features of the studies that choose.
        valid_labels: (n, 18) of theirs.
        test: features of the studies to score.
        strengths: scikit-learn's C, to choose from.

    Raises:
        ValueError: no finding has both classes in `valid_labels`.
    """
    scaler = StandardScaler().fit(train)
    x, *seen = (scaler.transform(split) for split in (train, valid, test))
    both = dict(with_both_classes(labels))
    one_class = tuple(name for k, name in enumerate(FINDINGS) if k not in both)

    def scored(strength: float) -> Scored:
        scores = [np.full((len(split), len(FINDINGS)), 0.5) for split in seen]
        for k, known in both.items():
            model = LogisticRegression(C=strength, max_iter=2000).fit(x[known], labels[known, k])
            for split, out in zip(seen, scores, strict=True):
                out[:, k] = model.predict_proba(split)[:, 1]
        return Scored(scores[0], scores[1], f"C = {strength:g}", len(both) * (train.shape[1] + 1), one_class)

    return best(map(scored, strengths), valid_labels)


def _on_features(data: Data, studies: Sequence[int], features: Callable[[str], np.ndarray]) -> Scored:
    chosen, labels, valid_labels = list(studies), data.labels("train"), data.labels("valid")
    train, valid, test = map(features, ("train", "valid", "test"))
    return logistic(train[chosen], labels[chosen], valid, valid_labels, test, STRENGTHS)


def _boxes(data: Data, studies: Sequence[int]) -> Scored:
    """Shares or their square roots, which small ones count for more in; of scans as they lie, or registered."""

    def found(roots: bool, *changes: str) -> Scored:
        power = 0.5 if roots else 1.0
        scored = _on_features(data, studies, lambda split: data.features(split, hu_boxes, *changes) ** power)
        return replace(scored, chosen=", ".join([scored.chosen, *changes, *["square roots"] * roots]))

    return best((found(r, *c) for r in (False, True) for c in ((), ("registration",))), data.labels("valid"))


def _probe(data: Data, studies: Sequence[int]) -> Scored:
    return _on_features(data, studies, lambda split: data.embedded(split).embeddings.numpy())


def ridge_map(images: torch.Tensor, texts: torch.Tensor, strength: float) -> torch.Tensor:
    """The matrix (p, p) that maps image embeddings (n, p) to text embeddings (n, p): ridge regression, closed form."""
    x = images.double()
    scale = x.pow(2).sum() / x.shape[1]  # of one feature, so that strengths do not depend on n
    gram = x.T @ x + strength * scale * torch.eye(x.shape[1])
    return torch.linalg.solve(gram, x.T @ texts.double()).float()


def _ridge(data: Data, studies: Sequence[int]) -> Scored:
    """Volumes to the embeddings of their own reports, or to those of the sentences that are true of them."""
    chosen = list(studies)
    rows = [data.train.rows[i] for i in chosen]
    stating, denying = data.in_words(WORDINGS["the hospital's wording"]).text_embeds().cpu()  # (18, p) each
    said = torch.from_numpy(np.nan_to_num(2 * data.labels("train")[chosen] - 1)).float()  # what is unknown says nothing
    texts = {
        "reports": embed_reports(data.base.model, data.base.tokenizer, rows, progress=False).embeddings,
        "labels": F.normalize(said @ (stating - denying), dim=-1),
    }
    of = {split: data.embedded(split).embeddings for split in ("train", "valid", "test")}
    x, middle = of["train"][chosen], of["train"][chosen].mean(0)

    def scored(to: str, strength: float) -> Scored:
        matrix, mean = ridge_map(x - middle, texts[to] - texts[to].mean(0), strength), texts[to].mean(0)
        mapped = (F.normalize(mean + (of[split] - middle) @ matrix, dim=-1) for split in ("valid", "test"))
        return _asked(data, mapped, "paper", f"to {to}, strength {strength:g}", matrix.numel())

    return best((scored(to, strength) for to in texts for strength in reversed(RIDGES)), data.labels("valid"))


RIVALS: dict[str, Rival] = {
    # each scan moved so that its lungs lie where they lie at home
    "registration": _free("registration", changes=("registration",)),
    # quantiles of the HU within the body mapped to those of home (Nyul and Udupa 1999, Magn Reson Med 42:1072)
    "intensities": _free("intensities, each scan", changes=("intensities",)),
    "hospital-intensities": _free("intensities, one map", changes=("hospital intensities",)),
    # the mean of the hospital's embeddings made that of home; CORAL: and the covariance (see `fixes.coral`)
    "recentring": _free("re-centred embeddings", aligned="re-centred"),
    "coral": _free("CORAL", aligned="CORAL"),
    # eight wordings of each prompt, averaged (Radford et al. 2021, arXiv 2103.00020)
    "ensemble": _free("prompt ensemble", wording="ensemble"),
    # prompts in the sentences of the reports that the base model learnt from, or of the hospital's own
    "home-wording": _free("home's wording", wording="home's wording"),
    "wording": _free("the hospital's wording", wording="the hospital's wording"),
    "all-free": _free(
        "free fixes together", changes=("registration", "intensities"), aligned="re-centred", wording="ensemble"
    ),
    "best-free": Rival(
        "free fixes, best choice", "choose", _best_fixed,
        {"moved": MOVED, "aligned": ["", *ALIGNED], "wordings": [*WORDINGS], "quantiles": len(LEVELS)},
    ),
    "hu-boxes": Rival(
        "HU in boxes", "learn", _boxes,
        {"bands": BANDS, "boxes": BOXES, "C": STRENGTHS, "roots": [False, True], "moved": ["", "registration"]},
    ),
    # Alain and Bengio 2016, arXiv 1610.01644; it knows the findings it learnt only
    "linear-probe": Rival("linear probe", "learn", _probe, {"C": STRENGTHS}),
    "ridge": Rival("ridge", "learn", _ridge, {"strengths": RIDGES, "to": ["reports", "labels"]}),
}  # fmt: skip
