"""A torch dataset over a manifest, with the prepared volumes kept on disk.

Phantoms are made from their seeds, real scans (rows with a `path`) are read; both go through `preprocess`
once. A prepared volume is a small file whose name is a hash of the study's checksum and the settings, so a
changed setting never reads an old file; a damaged file is noticed and made again.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from medctkit.findings import FINDINGS
from medctkit.manifest import study_from_row
from medctkit.preprocessing import PreprocessConfig, preprocess
from medctkit.volumes import read_volume

if TYPE_CHECKING:
    import pandas as pd

CACHE_FORMAT = 1  # raised when the content of prepared files changes
STEPS = 32767  # prepared values are stored as whole numbers of 1/32767: at most 1.6e-5 off, 0.016 HU


class CTReportDataset(Dataset):
    """Volumes, reports and labels of the rows of a manifest.

    An item is a dict: `study` and `patient` (str), `pixel_values` float32 (1, D, H, W) in [-1, 1], `report`
    (str) and `labels` float32 (18,).

    Args:
        manifest: rows as `load_manifest` gives them.
        preprocess_config: spacing and shape that the model wants.
        cache_dir: folder for prepared volumes; None: prepare anew at every access.

    Raises:
        ValueError: no rows.
    """

    def __init__(self, manifest: "pd.DataFrame", preprocess_config: PreprocessConfig, cache_dir=None):
        if not len(manifest):
            raise ValueError("the manifest has no rows for this dataset; look at its hospital and split columns")
        self.rows: list[dict] = manifest.to_dict("records")
        self.config = preprocess_config
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
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
        """Prepare what is not in the cache yet, in parallel; stop and start again as you like."""
        from concurrent.futures import ProcessPoolExecutor, as_completed
        from multiprocessing import get_context

        from tqdm.auto import tqdm

        if self.cache_dir is None:
            raise ValueError("prepare() needs a cache_dir to put the volumes into; give one to CTReportDataset")
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        todo = [row for row in self.rows if not self._file(row).exists()]
        if not todo:
            return
        workers = workers or os.cpu_count() or 1
        megabytes = len(todo) * 2 * np.prod(self.config.shape) / 1e6
        print(f"preparing {len(todo)} of {len(self.rows)} studies on {workers} cores, at most {megabytes:.0f} MB")
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
            parts = [todo[i : i + 8] for i in range(0, len(todo), 8)]
            futures = [pool.submit(_prepare_rows, part, self.config, self.cache_dir) for part in parts]
            try:
                with tqdm(total=len(todo), desc="preparing", unit="study") as bar:
                    for future in as_completed(futures):
                        bar.update(future.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def in_memory(self) -> "CTReportDataset":
        """Load all volumes at once and go on from memory (0.5 MB each at the mini size); returns itself."""
        from tqdm.auto import tqdm

        bar = tqdm(self.rows, desc="loading", unit="study", leave=False, delay=2)
        self._loaded = [self._pixels(row) for row in bar]
        return self

    def _file(self, row: dict) -> Path:
        key = repr((CACHE_FORMAT, row["checksum"], row.get("path"), self.config))
        return self.cache_dir / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"

    def _pixels(self, row: dict) -> torch.Tensor:
        if self.cache_dir is None:
            return _make(row, self.config)
        file = self._file(row)
        values = _load(file, self.config.shape) if file.exists() else None
        if values is None:
            values = (_make(row, self.config).numpy() * STEPS).round().astype(np.int16)
            _save(values, file)
        # from the stored numbers the first time too, so that a second run sees exactly what the first saw
        return torch.from_numpy(values.astype(np.float32) / STEPS)


def _make(row: dict, config: PreprocessConfig) -> torch.Tensor:
    """Read or generate a row's volume and prepare it."""
    path = row.get("path")
    if isinstance(path, str) and path:
        return preprocess(read_volume(path), config)
    return preprocess(study_from_row(row).volume, config)


def _save(values: np.ndarray, file: Path) -> None:
    digest = np.frombuffer(hashlib.sha256(values.tobytes()).digest(), dtype=np.uint8)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.stem}.{os.getpid()}.tmp.npz")
    np.savez_compressed(temporary, values=values, digest=digest)
    os.replace(temporary, file)


def _load(file: Path, shape: Sequence[int]) -> np.ndarray | None:
    """The int16 values of a prepared volume, or None if the file is damaged."""
    try:
        with np.load(file, allow_pickle=False) as found:
            values, digest = found["values"], found["digest"]
    except Exception:  # a flipped bit may raise anything: zip, zlib, "encrypted", "not supported" ...
        return None
    if values.shape != (1, *shape) or hashlib.sha256(values.tobytes()).digest() != digest.tobytes():
        return None
    return values


def _one_thread() -> None:
    torch.set_num_threads(1)  # the processes are the parallelism


def _prepare_rows(rows: list[dict], config: PreprocessConfig, cache_dir: Path) -> int:
    import pandas as pd

    dataset = CTReportDataset(pd.DataFrame(rows), config, cache_dir)
    for row in dataset.rows:
        dataset._pixels(row)
    return len(rows)


def collate(tokenizer: Any, max_length: int = 128) -> Callable[[Sequence[dict]], dict[str, Any]]:
    """A collate function: items to a batch with tokenised reports.

    Args:
        tokenizer: of the model's text encoder.
        max_length: tokens a report is cut to; shorter batches are padded to their longest report only.

    Returns:
        A function from b items to a dict: `study` and `patient` (lists), `pixel_values` (b, 1, D, H, W),
        `input_ids` and `attention_mask` (b, n), `labels` (b, 18).
    """

    def to_batch(items: Sequence[dict]) -> dict[str, Any]:
        reports = [item["report"] for item in items]
        words = tokenizer(reports, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        return {
            "study": [item["study"] for item in items],
            "patient": [item["patient"] for item in items],
            "pixel_values": torch.stack([item["pixel_values"] for item in items]),
            "input_ids": words["input_ids"],
            "attention_mask": words["attention_mask"],
            "labels": torch.stack([item["labels"] for item in items]),
        }

    return to_batch
