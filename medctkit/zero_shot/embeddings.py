"""Embeddings of a data set in one file, with what they were made from.

A volume is encoded once; prompts, thresholds and retrieval can then be tried in no time. The file says of which base
model, adapter, pre-processing, precision and studies it is, and is refused for any other, because scores of mixed
origin look like any others.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.data import Dataset, Subset
from tqdm.auto import tqdm

from medctkit.cohort.cache import content_of, key_of
from medctkit.cohort.dataset import CTReportDataset, labels_of
from medctkit.common.atomic import replacing
from medctkit.common.processes import in_main_process, process_and_processes
from medctkit.common.provenance import differences
from medctkit.findings import FINDINGS, refuse_other_findings
from medctkit.model.fingerprint import digest_of_tensors, digests
from medctkit.model.weights import write_weights
from medctkit.scans.preprocessing import PreprocessConfig
from medctkit.zero_shot.classifier import Embedded, ZeroShotClassifier

BLOCK = 32  # volumes of a process between two writes: what an interruption costs at most


def describe(model: nn.Module, preprocess_config: PreprocessConfig) -> dict[str, Any]:
    """What embeddings of a model are made from; `precision`: the types of the weights, and of autocast if it is on."""
    base, adapter = digests(model)
    kinds = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
    device = next(model.parameters()).device.type
    if torch.is_autocast_enabled(device):
        kinds.append(f"autocast {str(torch.get_autocast_dtype(device)).removeprefix('torch.')}")
    return {
        "base model": base,
        "adapter": adapter,
        "preprocessing": asdict(preprocess_config),
        "precision": ", ".join(kinds),
    }


def save_embeddings(embedded: Embedded, path: str | os.PathLike, made_of: Mapping[str, Any]) -> None:
    """Write embeddings, whole or not at all: a safetensors file, 2 kB for each volume at full size.

    What they are `made_of` is from `describe`, or anything else that JSON can hold.

    Raises:
        ValueError: parts of unequal length, embeddings that are not finite, a study twice; says which.
    """
    _check(embedded)
    tensors = {
        "embeddings": embedded.embeddings.detach().to("cpu", torch.float32).contiguous(),
        "labels": torch.from_numpy(np.ascontiguousarray(embedded.labels, dtype=np.float32)),
    }
    rest = {"made_of": dict(made_of), "findings": FINDINGS, "sha256": digest_of_tensors(tensors)}
    rest |= {"studies": list(map(str, embedded.studies)), "patients": list(map(str, embedded.patients))}
    rest |= {"versions": {"medctkit": version("medctkit"), "torch": torch.__version__}}  # told, not compared
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        write_weights(tensors, temporary, {"medctkit": json.dumps(rest)})


def load_embeddings(path: str | os.PathLike, made_of: Mapping[str, Any] | None = None) -> Embedded:
    """Read what `save_embeddings` wrote, to the last bit; entries of the file that are not in `made_of` may be any.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, or one of another model, other settings, studies or findings; says which.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; medctkit embed writes one")
    try:
        with safe_open(str(path), "pt") as file:
            rest = json.loads(file.metadata()["medctkit"])
            tensors = {name: file.get_tensor(name) for name in ("embeddings", "labels")}
        if rest["sha256"] != digest_of_tensors(tensors):
            raise ValueError("its numbers are not those that were written")
        patients, studies = (np.array(rest[name]) for name in ("patients", "studies"))
        embedded = Embedded(tensors["embeddings"], tensors["labels"].numpy(), patients, studies)
        there, findings = dict(rest["made_of"]), tuple(rest["findings"])
        _check(embedded, len(findings))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged, or no file of embeddings: {error}. Delete it and embed anew, or give another file"
        ) from None
    refuse_other_findings(str(path), findings)
    made_of = made_of or {}
    if different := differences({key: there.get(key, "nothing") for key in made_of}, made_of):
        raise ValueError(
            f"{path} holds embeddings of something else. {'; '.join(different)}. Use the model, adapter, settings and "
            "studies that it was made from, or embed anew into another file"
        )
    return embedded


def _check(embedded: Embedded, findings: int = len(FINDINGS)) -> None:
    n = len(embedded.studies)
    for name, expected in (("embeddings", 2), ("labels", 2), ("patients", 1), ("studies", 1)):
        shape = tuple(getattr(embedded, name).shape)
        if len(shape) != expected or shape[0] != n or (name == "labels" and shape[1] != findings):
            raise ValueError(
                f"{name} have shape {shape}, but there are {n} studies; expected one row for each of them, "
                f"and {findings} labels"
            )
    _refuse_twice(embedded.studies)
    finite = embedded.embeddings.isfinite().all(1)
    if not finite.all():
        first = embedded.studies[int((~finite).int().argmax())]
        raise ValueError(f"study {first} has an embedding that is not finite; look at its volume and at the model")


def _refuse_twice(studies: Sequence[str] | np.ndarray) -> None:
    names, counts = np.unique(np.asarray(studies), return_counts=True)
    if len(names) < len(studies):
        raise ValueError(f"study {names[counts.argmax()]} is there {counts.max()} times; each has one embedding")


def refuse_other_order(
    studies: Sequence[Any] | np.ndarray, expected: Sequence[Any] | np.ndarray, what: str, other: str
) -> None:
    """Refuse names of studies that are not those expected in the same order: row i would be taken for another study's.

    `what` is one of the first and `other` one of the second, for the message.

    Raises:
        ValueError: the first row that differs, and both names.
    """
    studies, expected = list(map(str, studies)), list(map(str, expected))
    if len(studies) != len(expected):
        raise ValueError(
            f"one {what} for each {other} is needed, but they are {len(studies):,} and {len(expected):,}; make both "
            "from the same rows of the manifest"
        )
    for row, (one, another) in enumerate(zip(studies, expected, strict=True)):
        if one != another:
            same = "the same studies, in another order" if sorted(studies) == sorted(expected) else "other studies"
            raise ValueError(
                f"row {row}: the {what} is of study {one}, the {other} of study {another} ({same}); make both from the "
                "same rows of the manifest"
            )


def embed_manifest(
    classifier: ZeroShotClassifier,
    dataset: CTReportDataset,
    path: str | os.PathLike,
    batch_size: int = 32,
    workers: int = 0,
    progress: bool = True,
    block: int = BLOCK,
) -> Embedded:
    """Embeddings of a data set: read from the file if they are in it, else computed and written to it.

    Stopped in the middle, the same call goes on: finished blocks wait in a folder beside the file, which is gone in the
    end. Under `accelerate launch` the processes share the work. Labels and patients are those of the data set at hand,
    so a corrected label costs no new embedding.

    Of `classifier` the model is used; for `dataset`, `batch_size`, `workers` and `progress` see its `embed`. `path` is
    written after each `block` of volumes of a process.

    Raises:
        ValueError: a file of other studies, or of the same in another order; see `load_embeddings`; a study twice.
    """
    path, rows = Path(path).expanduser(), dataset.rows
    parts, (process, processes) = path.with_name(path.name + ".parts"), process_and_processes()
    studies = [row["study"] for row in rows]
    _refuse_twice(studies)
    keys = [(row["study"], key_of(row, content_of(row), dataset.config)) for row in rows]
    made_of = describe(classifier.model, dataset.config)
    made_of["studies"] = f"{len(rows)}, {hashlib.sha256(repr(keys).encode()).hexdigest()[:32]}"
    found = in_main_process(lambda: _finished(path, parts, studies, made_of))
    left = [i for i, study in enumerate(studies) if study not in found]
    silent = not progress or process > 0 or not left
    if not silent:
        tqdm.write(f"{len(rows):,} volumes, of which {len(found):,} are embedded and {len(left):,} are left: {path}")
    with tqdm(total=len(rows), initial=len(found), desc="embedding", unit="volume", disable=silent) as bar:
        for start in range(0, len(left), block * processes):
            indices = left[start : start + block * processes]
            seen = classifier.embed(Subset(dataset, indices), batch_size, progress=False, workers=workers)
            file = parts / f"{indices[0]:07}.safetensors"
            in_main_process(partial(save_embeddings, seen, file, made_of))
            found |= zip(seen.studies.tolist(), seen.embeddings, strict=True)
            bar.update(len(indices))

    embedded = Embedded(
        torch.stack([found[study] for study in studies]),
        labels_of(rows).astype(np.float32),
        np.array([row["patient"] for row in rows]),
        np.array(studies),
    )
    in_main_process(lambda: _finish(embedded, path, parts, made_of))
    return embedded


def _finished(path: Path, parts: Path, studies: Sequence[str], made_of: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The embedding of every study that is in the file, or in blocks of a run that was interrupted."""
    if path.is_file():
        refuse_other_order(load_embeddings(path).studies, studies, f"embedding in {path}", "row of the manifest")
        loaded = [load_embeddings(path, made_of)]
    else:
        try:
            loaded = [load_embeddings(file, made_of) for file in sorted(parts.glob("*.safetensors"))]
        except ValueError as error:
            unfinished = f"An earlier run into {path} was not finished; to start over, delete {parts}"
            raise ValueError(f"{error}. {unfinished}") from None
    return {study: embed for e in loaded for study, embed in zip(e.studies.tolist(), e.embeddings, strict=True)}


def _finish(embedded: Embedded, path: Path, parts: Path, made_of: Mapping[str, Any]) -> None:
    """Write the file, unless it is there and says the same."""
    try:
        same_studies(load_embeddings(path), embedded)
    except (FileNotFoundError, ValueError):
        save_embeddings(embedded, path, made_of)
    shutil.rmtree(parts, ignore_errors=True)


def same_studies(a: Embedded, b: Embedded) -> None:
    """Make sure that two models saw the same studies in the same order, so that their scores can be compared.

    Raises:
        ValueError: names the first study where names, patients or labels differ.
    """
    refuse_other_order(a.studies, b.studies, "embedding of one model", "embedding of the other")
    for what, one, two in (("patient", a.patients, b.patients), ("labels", a.labels, b.labels)):
        for study, x, y in zip(a.studies, np.asarray(one).tolist(), np.asarray(two).tolist(), strict=True):
            if str(x) != str(y):  # an unknown label, NaN, is not itself, but reads the same
                said = f"{what} {x!r} for one model, {y!r} for the other"
                raise ValueError(f"study {study}: {said}; embed the same data set")


class Changed(Dataset):
    """A data set or a list, each item changed when it is asked for."""

    def __init__(self, dataset: Dataset | Sequence, change: Callable[[dict], Any]):
        self.dataset, self.change = dataset, change

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        return self.change(self.dataset[index])


def with_embeddings(dataset: Dataset, embedded: Sequence[Embedded], name: str = "anchor") -> Dataset:
    """A data set whose items have, by that name, the embedding of their study out of `embedded`."""
    known = {study: vector for each in embedded for study, vector in zip(each.studies, each.embeddings, strict=True)}
    return Changed(dataset, lambda item: item | {name: known[item["study"]]})
