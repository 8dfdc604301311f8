"""A torch dataset over a manifest, with the prepared volumes kept on disk.

Phantoms are made from their seeds, real scans (rows with a `path`) are read; both go through `preprocess`
once, and are read from the cache from then on.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from medctkit.cohort.cache import VolumeCache, content_of, key_of, prepare_row
from medctkit.cohort.manifest import volume_from_row
from medctkit.cohort.prepare import prepare
from medctkit.common.processes import accelerator_for
from medctkit.common.text import listed
from medctkit.findings import FINDINGS
from medctkit.scans.preprocessing import PreprocessConfig, preprocess

IN_MEMORY = 4e9  # bytes of volumes up to which a data set is loaded at once


class CTReportDataset(Dataset):
    """Volumes, reports and labels of the rows of a manifest.

    An item is a dict: `study` and `patient` (str), `pixel_values` float32 (1, D, H, W) in [-1, 1], `report`
    (str) and `labels` float32 (18,). Without a `cache_dir` for prepared volumes, each access prepares anew.

    Raises:
        ValueError: no rows.
    """

    def __init__(self, manifest: pd.DataFrame, preprocess_config: PreprocessConfig, cache_dir=None):
        if not len(manifest):
            raise ValueError("the manifest has no rows for this dataset; look at its hospital and split columns")
        self.rows: list[dict] = manifest.to_dict("records")
        self.config = preprocess_config
        self.cache = None if cache_dir is None else VolumeCache(cache_dir)
        self._loaded: list[torch.Tensor] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        pixels = self._loaded[index] if self._loaded is not None else self._pixels(row)
        return {
            "study": row["study"],
            "patient": row["patient"],
            "pixel_values": pixels,
            "report": row["report"],
            "labels": torch.tensor([float(row[name]) for name in FINDINGS]),
        }

    def prepare(self, workers: int | None = None) -> None:
        """Prepare what is not in the cache yet, in parallel; stop and start again as you like.

        Raises:
            ValueError: no `cache_dir`, or studies that could not be prepared: which, and why. The others are.
            OSError: no room on the disk.
        """
        if self.cache is None:
            raise ValueError("prepare() needs a cache_dir to put the volumes into; give one to CTReportDataset")
        done = prepare(self.rows, self.config, self.cache.folder, workers=workers)
        for row in self.rows:  # so that no file is hashed again
            row["checksum"] = done.contents.get(row["study"], row["checksum"])
        if done.failures:
            listing = listed([f"  {failure['study']}: {failure['message']}" for failure in done.failures])
            raise ValueError(f"{len(done.failures)} of {len(self.rows)} studies could not be prepared:\n{listing}")

    def in_memory(self) -> "CTReportDataset":
        """Load all volumes at once and go on from memory (0.5 MB each at the mini size); returns itself."""
        bar = tqdm(self.rows, desc="loading", unit="study", leave=False, delay=2)
        self._loaded = [self._pixels(row) for row in bar]
        return self

    def _pixels(self, row: dict) -> torch.Tensor:
        if self.cache is None:
            return preprocess(volume_from_row(row), self.config)
        content = content_of(row)
        key = key_of(row, content, self.config)
        pixels = self.cache.load(key)
        if pixels is None:
            prepare_row(row, content, self.config, self.cache)
            # as it was stored, so that a second run sees exactly what the first saw
            pixels = self.cache.load(key)
            if pixels is None:
                raise OSError(f"{self.cache.path(key)}: what was just written there can't be read back")
        row["checksum"] = content  # so that its file is hashed once, not in every epoch
        return pixels


def collate(tokenizer: Any, max_length: int = 128) -> Callable[[Sequence[dict]], dict[str, Any]]:
    """A collate function: items to a batch with tokenised reports. Processes that load volumes take it along.

    Args:
        tokenizer: of the model's text encoder.
        max_length: tokens a report is cut to; shorter batches are padded to their longest report only.

    Returns:
        A function from b items to a dict: `study` and `patient` (lists), `pixel_values` (b, 1, D, H, W),
        `input_ids` and `attention_mask` (b, n), `report_id` (b,) equal for equal reports, `labels` (b, 18);
        `anchor` (b, p), if the items have one.
    """
    return partial(_to_batch, tokenizer, max_length)


def _to_batch(tokenizer: Any, max_length: int, items: Sequence[dict]) -> dict[str, Any]:
    reports = [item["report"] for item in items]
    words = tokenizer(reports, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    tensors = [name for name in ("pixel_values", "labels", "anchor") if name in items[0]]
    return {
        "study": [item["study"] for item in items],
        "patient": [item["patient"] for item in items],
        "input_ids": words["input_ids"],
        "attention_mask": words["attention_mask"],
        "report_id": report_ids(words["input_ids"], words["attention_mask"]),
        **{name: torch.stack([item[name] for item in items]) for name in tensors},
    }


def report_ids(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """A number (b,) for each tokenised report (b, n), the same for the same tokens in whatever batch."""
    reports = (ids[mask.bool()].numpy().tobytes() for ids, mask in zip(input_ids, attention_mask, strict=True))
    return torch.tensor([int.from_bytes(blake2b(report, digest_size=8).digest(), signed=True) for report in reports])


def labels_of(rows: Sequence[Mapping]) -> np.ndarray:
    """Labels (n, 18) of rows of a manifest; NaN where unknown."""
    return np.array([[float(row[name]) for name in FINDINGS] for row in rows])


def load_split(
    manifest: pd.DataFrame, hospital: str | None, split: str, preprocess_config: PreprocessConfig, cache_dir
) -> CTReportDataset:
    """The prepared studies of one hospital (None: of all) and split.

    Those of "train" and "valid", which are seen again and again, are in memory if they are small enough. Under
    `accelerate launch` the first process prepares them and the others wait.

    Raises:
        ValueError: no such studies.
    """
    dataset = CTReportDataset(rows_of(manifest, hospital, split), preprocess_config, cache_dir)
    with accelerator_for().main_process_first():
        dataset.prepare()
    return dataset if split == "test" else at_hand(dataset)


def rows_of(manifest: pd.DataFrame, hospital: str | None, split: str) -> pd.DataFrame:
    """The rows of one hospital (None: of all) and split; that there are none is a ValueError."""
    rows = manifest[manifest["split"] == split]
    if hospital is not None:
        rows = rows[rows["hospital"] == hospital]
    if not len(rows):
        known = ", ".join(sorted(manifest["hospital"].unique()))
        raise ValueError(f"the manifest has no {split} studies of hospital {hospital!r}; its hospitals are {known}")
    return rows


def at_hand(dataset: CTReportDataset) -> CTReportDataset:
    """A data set that is seen again and again: in memory, if it is small enough."""
    small = 4 * math.prod(dataset.config.shape) * len(dataset) <= IN_MEMORY
    return dataset.in_memory() if small else dataset


def prepared_dir(manifest_path: str | os.PathLike, output_dir: str | os.PathLike, cache_dir=None) -> Path:
    """Where prepared volumes are: `cache_dir`, else beside the manifest (`medctkit prepare`), else in `output_dir`."""
    beside = Path(manifest_path).expanduser().parent / "prepared"
    chosen = cache_dir if cache_dir is not None else beside if beside.is_dir() else Path(output_dir) / "prepared"
    return Path(chosen).expanduser()
