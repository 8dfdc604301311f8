"""Retrieval: which volume a report is of, and which volumes look like a volume.

*Report to volume*: for each report, where among all volumes its own comes by cosine; recall@k is the share of reports
whose volume is among the first k (k = 5, 10, 50, 100 in CT-CLIP's paper, arXiv 2403.17834). Volumes whose reports are
the same, word for word, are right for each other, as two reconstructions of one scan are: no report could tell them
apart. The paper's code counts only the one volume in the same place of the list.

*Volume to volume*: for each volume, whether those that look most like it have its findings. Each finding is a search
of its own: queries are the volumes that have it, and a volume found is relevant if it has it too; average precision is
averaged over queries, then over findings (MAP). Neither the query nor another scan of its patient can be found. This is
not what the paper's code calls MAP: there it is the mean overlap of the label sets of the query and of the first k
(shared findings over findings of either), with the query itself among those that can be found.

Both show chance, the value that a random order has on average, and 95 % intervals from a bootstrap over the patients
who ask; who can be found stays the same.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from medctkit.findings import FINDINGS
from medctkit.metrics.bootstrap import interval, patient_weights, weighted_means, with_interval
from medctkit.model.protocol import Model
from medctkit.zero_shot.classifier import Embedded, evaluating
from medctkit.zero_shot.embeddings import refuse_other_order

AT_A_TIME = 4_000_000  # similarities in memory
OFF_UNIT = 0.02  # how far from 1 bfloat16 leaves the length of a normalised embedding


@dataclass(frozen=True)
class EmbeddedReports:
    """Reports seen through a text encoder."""

    embeddings: torch.Tensor  # (n, projection_dim) float32, L2-normalised
    reports: tuple[str, ...]
    studies: np.ndarray  # (n,) names
    cut: int  # how many reports were longer than the text encoder's positions and lost their end


def embed_reports(
    model: Model, tokenizer: Any, rows: Sequence[Mapping[str, Any]], batch_size: int = 32, progress: bool = True
) -> EmbeddedReports:
    """Encode the reports of rows with `study` and `report`; equal ones, as of two reconstructions, once.

    Raises:
        ValueError: no rows, or a study without a report.
    """
    if not len(rows):
        raise ValueError("there are no reports to embed")
    for row in rows:
        if not isinstance(row["report"], str) or not row["report"].strip():
            raise ValueError(f"study {row['study']} has no report; leave it out of report-to-volume retrieval")
    longest = model.longest_text
    # alike in length, so that little is padding; and always in the same order, so that the last bits are the same
    texts = sorted({row["report"] for row in rows}, key=lambda report: (len(report), report))
    device = next(model.parameters()).device
    found: dict[str, tuple[torch.Tensor, bool]] = {}
    with evaluating(model):
        for start in tqdm(range(0, len(texts), batch_size), desc="reports", disable=not progress):
            part = texts[start : start + batch_size]
            counted = tokenizer(part, truncation=True, max_length=longest + 1)["input_ids"]
            words = tokenizer(part, padding=True, truncation=True, max_length=longest, return_tensors="pt")
            embeds = model.encode_text(words["input_ids"].to(device), words["attention_mask"].to(device))
            cut = (len(ids) > longest for ids in counted)
            found |= zip(part, zip(embeds.float().cpu(), cut, strict=True), strict=True)
    reports = tuple(row["report"] for row in rows)
    embeddings, were_cut = zip(*(found[report] for report in reports), strict=True)
    return EmbeddedReports(torch.stack(embeddings), reports, np.array([row["study"] for row in rows]), sum(were_cut))


def report_ranks(reports: EmbeddedReports, volumes: Embedded) -> np.ndarray:
    """For each report the place (n,) of its own volume among all, from 1; of several that are right, the first's.

    A volume exactly as similar as the right one comes before it, so that a model that sees no difference finds nothing.

    Raises:
        ValueError: not the same studies in the same order; embeddings that are not finite or not normalised.
    """
    _check(reports.embeddings, reports.studies, "report")
    _check(volumes.embeddings, volumes.studies, "volume")
    refuse_other_order(reports.studies, volumes.studies, "report", "volume")
    widths = reports.embeddings.shape[1], volumes.embeddings.shape[1]
    if widths[0] != widths[1]:
        raise ValueError(f"reports have {widths[0]} numbers each, volumes {widths[1]}; embed both with the same model")
    which, ranks = torch.from_numpy(_of_equal_reports(reports)), []
    for at, similarity in _similarities(reports.embeddings, volumes.embeddings):
        right = which[at, None] == which[None, :]  # (chunk, n)
        best = similarity.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        ranks.append(1 + ((similarity >= best) & ~right).sum(1))
    return torch.cat(ranks).numpy()


def report_to_volume(
    reports: EmbeddedReports,
    volumes: Embedded,
    ks: Sequence[int] = (5, 10, 50, 100),
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Recall of each report's own volume among the first k: a row for each k, recall, low, high, chance, reports.

    The `volumes` are of the same studies as the `reports` in the same order. Those of the `ks` above their number are
    left out, and named in `.attrs["gaps"]`.

    Raises:
        ValueError: see `report_ranks`; no k is left; fewer than two patients.
    """
    ranks, n = report_ranks(reports, volumes), len(volumes.studies)
    ks, gaps = _fitting(ks, n)
    of = _of_equal_reports(reports)
    hits = (ranks[:, None] <= np.array(ks)).astype(float)  # (n, ks)
    draws = weighted_means(hits, patient_weights(volumes.patients, resamples, seed))[:, :-1]  # the mean says nothing
    low, high = interval(draws)
    right = np.bincount(of)[of]  # volumes that are right for each report
    # none of k volumes, drawn at random, is one of them
    miss = [(np.maximum(n - right[:, None] - np.arange(k), 0) / (n - np.arange(k))).prod(1).mean() for k in ks]
    columns = {"recall": draws[0], "low": low, "high": high, "chance": 1 - np.array(miss), "reports": n}
    table = pd.DataFrame(columns, index=pd.Index(ks, name="k"))
    table.attrs["gaps"] = gaps
    return table


def volume_to_volume(
    volumes: Embedded, ks: Sequence[int] = (5, 10, 50), resamples: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Mean average precision of finding volumes with the same finding.

    AP@k = sum over places i up to k of precision@i where place i is relevant, divided by min(k, relevant volumes); at
    k = all volumes it is scikit-learn's average precision. Ties are broken by the seed. A label that is unknown, NaN,
    is neither asked for nor found.

    Returns:
        A row for each finding and "mean": queries, and for each k, and for all volumes, map@k, map@k_low, map@k_high
        and map@k_chance. A finding that no query could find again has an empty row and is left out of the mean;
        `.attrs["gaps"]` names it, and each k above the number of volumes to be found.

    Raises:
        ValueError: labels of another shape, or other than 0, 1 and NaN; embeddings that are not finite or not
            normalised; no k is left; fewer than two patients.
    """
    _check(volumes.embeddings, volumes.studies, "volume")
    labels, n = np.asarray(volumes.labels, dtype=float), len(volumes.studies)
    if labels.shape != (n, len(FINDINGS)):
        raise ValueError(f"labels have shape {labels.shape}; expected {(n, len(FINDINGS))}, a row for each volume")
    for row, column in np.argwhere(~(np.isin(labels, (0, 1)) | np.isnan(labels))):
        raise ValueError(
            f"labels: study {volumes.studies[row]}, finding {FINDINGS[column]!r} is {labels[row, column]}; expected "
            "0, 1 or NaN (unknown)"
        )
    _, patient, scans = np.unique(volumes.patients, return_inverse=True, return_counts=True)
    if len(scans) < 2:
        raise ValueError("all volumes are of one patient, so there is nothing to find; it takes at least two patients")
    ks, gaps = _fitting(ks, n - int(scans.max()))
    limits = {f"map@{k}": k for k in ks} | {"map": n}
    shuffled = np.random.default_rng(seed).permutation(n)  # a stable sort then breaks ties by chance
    precision, chance = (np.full((len(limits), n, len(FINDINGS)), np.nan) for _ in range(2))
    for at, similarity in _similarities(volumes.embeddings, volumes.embeddings[torch.from_numpy(shuffled)]):
        order = shuffled[similarity.argsort(dim=1, descending=True, stable=True).numpy()]  # (chunk, n)
        others = patient[order] != patient[at][:, None]
        for f in range(len(FINDINGS)):
            asking = labels[at, f] == 1
            found = labels[order[asking], f]
            known = others[asking] & ~np.isnan(found)
            values = _average_precision(found == 1, known, list(limits.values()))
            precision[:, at[asking], f], chance[:, at[asking], f] = values

    asked, weights = ~np.isnan(precision[0]), patient_weights(volumes.patients, resamples, seed)
    columns: dict[str, Any] = {"queries": [*asked.sum(0), int(asked.any(1).sum())]}
    for row, name in enumerate(limits):
        columns |= with_interval(name, weighted_means(precision[row], weights))
        columns |= {f"{name}_chance": weighted_means(chance[row], weights[:, :1])[0]}
    table = pd.DataFrame(columns, index=pd.Index([*FINDINGS, "mean"], name="finding"))
    lonely = [name for name in FINDINGS if table.loc[name, "queries"] == 0]
    table.attrs["gaps"] = gaps | {name: "not in two patients, so nothing to find; left out" for name in lonely}
    return table


def _of_equal_reports(reports: EmbeddedReports) -> np.ndarray:
    """A number (n,) for each report, the same for equal ones."""
    return pd.factorize(np.array(reports.reports, dtype=object))[0]


def _average_precision(relevant: np.ndarray, known: np.ndarray, limits: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """AP@k of rows (q, n) in the order in which they were found, and what a random order has: both (ks, q).

    A random order has a relevant volume in place i with probability R / n, and then each of the i - 1 before it is
    relevant with probability (R - 1) / (n - 1).
    """
    relevant = relevant & known
    place, hits = known.cumsum(1), relevant.cumsum(1)
    precision = np.divide(hits, place, out=np.zeros(hits.shape), where=relevant)
    total, n = relevant.sum(1), known.sum(1)
    harmonic = np.concatenate([[0], (1 / np.arange(1, known.shape[1] + 1)).cumsum()])
    values = np.full((2, len(limits), len(relevant)), np.nan)
    again = (total - 1) / np.maximum(n - 1, 1)
    for row, k in enumerate(limits):
        deep = np.minimum(n, k)
        found = (precision * (place <= k)).sum(1)
        by_chance = total / np.maximum(n, 1) * (harmonic[deep] + again * (deep - harmonic[deep]))
        np.divide([found, by_chance], np.minimum(total, k), out=values[:, row], where=total > 0)
    return values[0], values[1]


def _similarities(queries: torch.Tensor, gallery: torch.Tensor) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Indices of some queries and their cosines (some, n), until all have had their turn."""
    for at in torch.arange(len(queries)).split(max(1, AT_A_TIME // len(gallery))):
        yield at.numpy(), queries[at] @ gallery.T


def _fitting(ks: Sequence[int], most: int) -> tuple[list[int], dict[str, str]]:
    """The ks up to `most`, and why the others are left out."""
    if wrong := [k for k in ks if isinstance(k, bool) or k != int(k) or k < 1]:
        raise ValueError(f"ks={list(ks)}: expected whole numbers of at least 1, got {wrong[0]!r}")
    kept = sorted({int(k) for k in ks if k <= most})
    if not kept:
        raise ValueError(f"ks={list(ks)}, but only {most} volumes can be found; give a smaller k, or more volumes")
    return kept, {f"@{k}": f"only {most} volumes can be found; left out" for k in ks if k > most}


def _check(embeds: torch.Tensor, studies: np.ndarray, what: str) -> None:
    if embeds.ndim != 2 or len(embeds) != len(studies) or not len(studies):
        expected = f"({len(studies)}, p), one for each study"
        raise ValueError(f"{what} embeddings have shape {tuple(embeds.shape)}; expected {expected}")
    for row, length in enumerate(embeds.norm(dim=1).tolist()):
        if not abs(length - 1) < OFF_UNIT:  # NaN is wrong, too
            raise ValueError(
                f"the {what} embedding of study {studies[row]} (row {row}) has length {length:.4g}; expected 1, as "
                "encode_image and encode_text normalise it"
            )
