"""Where a score lies among those of other scans: by itself it says little, for each finding has a level of its own."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from medctkit.common.provenance import write_json
from medctkit.findings import FINDINGS
from medctkit.model.fingerprint import digests, vocabulary_of
from medctkit.zero_shot.prompts import Prompts

FILE = "reference_scores.json"  # in a model's folder
_PERCENT = np.arange(101)


def write_reference(folder: str | os.PathLike, model: Any, tokenizer: Any, scores: np.ndarray, of: str) -> None:
    """Write down the percentiles of a model's scores (n, 18) in the prompts "paper", and of what scans they are."""
    percentiles = np.percentile(scores, _PERCENT, axis=0).round(5).T.tolist()
    made_of = {"weights": digests(model), "vocabulary": vocabulary_of(tokenizer)}
    write_json({"of": of, **made_of, "percentiles": dict(zip(FINDINGS, percentiles, strict=True))}, Path(folder) / FILE)


def places(
    folder: str | os.PathLike, model: Any, tokenizer: Any, prompts: Prompts, scores: np.ndarray
) -> np.ndarray | None:
    """How many of 100 reference scans score lower than `scores` (18,), for each finding: (18,).

    None: `folder` has no reference, or that of another model (an adapter makes one), other words, prompts or findings.
    """
    file = Path(folder) / FILE
    if prompts != "paper" or not file.is_file():
        return None
    known = json.loads(file.read_text(encoding="utf-8"))
    if vocabulary_of(tokenizer) != known["vocabulary"] or list(digests(model)) != known["weights"]:
        return None
    of = known["percentiles"]
    if not of.keys() >= set(FINDINGS):
        return None
    return np.array([np.interp(score, of[name], _PERCENT) for name, score in zip(FINDINGS, scores, strict=True)])
