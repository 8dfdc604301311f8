"""What is right and what is wrong in the exercises of notebook 07, from adapter to clinic."""

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch

from medctkit.course.exercises import Wrong, checks, number
from medctkit.deploy.bank import AdapterBank
from medctkit.findings import FINDINGS

ROUNDING = 1e-4  # of a score: less is no other answer


@checks("07.1")
def stale_prompts(stale: Iterable[int], log: pd.DataFrame, bank: AdapterBank, volumes: torch.Tensor) -> str:
    """Rows of a log (`adapter`, and the 18 scores given) of volumes (n, 1, d, h, w) asked with another's prompts."""
    found = {int(number(one, "the number of a request")) for one in stale}
    asked, everything = np.array(log["adapter"]), set(range(len(log)))
    off = np.abs(log[list(FINDINGS)].to_numpy(float) - bank.scores(volumes, list(asked))).max(1)
    right = set(np.flatnonzero(off > ROUNDING).tolist())
    if found == right:
        return (
            f"Their scores are off by up to {off.max():.2f}, and nothing was said. A cache has to know what it depends "
            "on: `ZeroShotClassifier` looks whether the model has changed, the bank keeps prompts for each adapter."
        )
    if unknown := found - everything:
        raise Wrong(f"There is no request {max(unknown)}; they are numbered from 0 to {len(log) - 1}.")
    if found == everything:
        raise Wrong("Not all. Two ways to compute one score differ in the last digits: allow for rounding, 1e-4 say.")
    if found == everything - right:
        raise Wrong("Those are the requests that were answered rightly.")
    if found == set(np.flatnonzero(asked != asked[0]).tolist()):
        raise Wrong(f"You list what was not asked of {asked[0]}. The service was started again: with which adapter?")
    raise Wrong(
        f"{len(found - right)} of yours were answered rightly, {len(right - found)} stale ones are missing. Score each "
        "volume with its own adapter, and look at the largest of the 18 differences."
    )


@checks("07.2")
def is_equal(accepts: Callable[..., bool]) -> str:
    """A check of an export, `accepts(export, model, volumes)`, held against exports with one fault each."""
    generator = np.random.default_rng(0)
    volumes = generator.standard_normal((5, 1, 2, 4, 4)).astype(np.float32)
    weights = generator.standard_normal((32, 6)).astype(np.float32)

    def model(v: np.ndarray) -> np.ndarray:
        embeds = v.reshape(len(v), -1) @ weights
        return embeds / np.linalg.norm(embeds, axis=1, keepdims=True)

    def fixed(v: np.ndarray, size: int = 2) -> np.ndarray:
        if len(v) != size:
            raise RuntimeError(f"index: 0 Got: {len(v)} Expected: {size}")
        return model(v)

    def neighbours(v: np.ndarray) -> np.ndarray:
        return model(v + (v - v.mean(0)))  # v alone where the batch is one volume

    faults: dict[Callable[[np.ndarray], np.ndarray], str] = {
        fixed: "an export whose batch is fixed at 2. How many volumes did you give it at a time?",
        lambda v: np.resize(model(v), (2, 6)): "an export that gives two embeddings whatever it gets.",
        neighbours: "an export in which the volumes of a batch change each other. Try batches of more than one.",
        lambda v: model(v) + 1e-3: "an export that is off by 0.001 everywhere: allowed is 1e-6.",
        lambda v: model(v) * np.nan: "an export that gives NaN. No comparison with NaN is true, `off > 1e-6` neither.",
        partial(fixed, size=5): "an export whose batch is fixed at 5. Give it fewer volumes at a time, too.",
    }

    if accepts(lambda v: model(v) + np.float32(1e-8), model, volumes) not in (True, np.True_):
        raise Wrong("`accepts` does not say True of an export that is right but for rounding, 1e-8.")
    for export, said in faults.items():
        if accepts(export, model, volumes):
            raise Wrong(f"`accepts` lets through {said}")
    return (
        "`medctkit export` does the same with batches of 1, 2 and 3, and counts flipped codes as well: it writes "
        "nothing that falls through."
    )


@checks("07.3")
def largest_flip(
    answer: tuple[str, str], studies: Sequence[str], thresholds: np.ndarray, before: np.ndarray, after: np.ndarray
) -> str:
    """Study and finding whose answer flips with the largest change; scores (n, 18), thresholds (18,)."""
    study, finding = (str(name) for name in answer)
    if finding not in FINDINGS or study not in list(studies):
        unknown = study if finding in FINDINGS else finding
        raise Wrong(f"There is no {unknown!r}. Expected the name of a study, then that of a finding.")
    at = list(studies).index(study), FINDINGS.index(finding)
    change, flips = np.abs(after - before), (before >= thresholds) != (after >= thresholds)
    largest = np.where(flips, change, 0).max()
    if not flips[at]:
        most = " It is the largest change of all, and yet on one side." if change[at] == change.max() else ""
        raise Wrong(f"That score stays on its side of the threshold: {before[at]:.3f} and {after[at]:.3f}.{most}")
    if change[at] < largest:
        raise Wrong(f"It flips, with a change of {change[at]:.3f}; another answer flips with {largest:.3f}.")
    return (
        f"From {before[at]:.3f} to {after[at]:.3f}, threshold {thresholds[at[1]]:.3f}: one of {flips.sum():,} of "
        f"{flips.size:,} answers that flip. A mean over studies says nothing of this one."
    )


@checks("07.4")
def wrong_with_a_report(complaints: Callable[[Any], Iterable[str]], report: Any) -> str:
    """What `complaints(report)` finds wrong with structured reports: "final", "verified", "no digest"."""

    def spoiled(names: Sequence[str] = (), **flags: str) -> Any:
        made = copy.deepcopy(report)
        for name, value in flags.items():
            setattr(made, name, value)
        for element in [e for e in made.iterall() if e.keyword == "ContentSequence"]:
            element.value = [i for i in element.value if not str(i.get("TextValue", "")).startswith(tuple(names))]
        return made

    final, verified = {"PreliminaryFlag": "FINAL"}, {"VerificationFlag": "VERIFIED"}
    digests = ("base:", "adapter:", "vocabulary:")
    cases = [
        ("the report as it was answered", report, set()),
        ("a final report", spoiled(**final), {"final"}),
        ("a verified report", spoiled(**verified), {"verified"}),
        ("a report without any digest", spoiled(digests), {"no digest"}),
        *((f"a report without the digest of the {name[:-1]}", spoiled([name]), {"no digest"}) for name in digests),
        ("a report with all three faults", spoiled(digests, **final, **verified), {"final", "verified", "no digest"}),
    ]
    for what, made, right in cases:
        said = complaints(made)
        found = {said} if isinstance(said, str) else set(said)
        if found != right:
            raise Wrong(f"Of {what} you say {sorted(found) or 'nothing'}; expected {sorted(right) or 'nothing'}.")
    return (
        "Ten lines that may stand before an archive. Without digests nobody can say later which model spoke, and what "
        "is final and verified will be read as if a person had looked."
    )
