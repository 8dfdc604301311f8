"""Prepared volumes on disk: each stored once, compressed, checked when it is read.

A file is named by a hash of what is in it: the content of the scan and every setting on the way to the model.
So a changed setting never reads an old file, and moving a data set loses nothing. Inside, a safetensors file
holds slabs of a few slices, each compressed with Blosc2; a SHA-256 of every slab and of the header shows damage.
Files appear under their name when they are whole, never before.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from medctkit.cohort.manifest import has_file, reading_arguments, volume_from_row
from medctkit.common.atomic import replacing
from medctkit.common.digests import sha256_of
from medctkit.scans.preprocessing import PreprocessConfig, preprocess
from medctkit.scans.stored import files_below

FORMAT = 3  # raised when the content of prepared files changes
STEPS = 8192  # prepared values are stored as whole numbers of 1/8192: at most 6.1e-5 off, 0.06 HU
SLAB = 8  # slices compressed together
SUFFIX = ".safetensors"
_STALE = 24 * 3600  # seconds after which a temporary file can't belong to a process that still writes


def digest_of(path: str | os.PathLike) -> str:
    """SHA-256 of what a scan consists of: a file's bytes, or those of all files in a folder, whatever their names.

    Raises:
        FileNotFoundError: nothing at `path`.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    if not path.is_dir():
        return sha256_of(path)
    inside = sorted(digest_of(file) for file in files_below(path) if file.is_file())
    return hashlib.sha256("".join(inside).encode()).hexdigest()


def cache_key(content: str, reading: Mapping[str, Any], config: PreprocessConfig) -> str:
    """Name of a prepared volume, 32 hexadecimal digits: from the scan's digest, how it is read, how it is prepared."""
    key = repr((FORMAT, STEPS, content, sorted(reading.items()), config))
    return hashlib.sha256(key.encode()).hexdigest()[:32]


class VolumeCache:
    """A folder of prepared volumes, made when the first is written.

    Any number of processes may use one folder at once: who writes second replaces a file by an equal one.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder).expanduser()

    def path(self, key: str) -> Path:
        """Where the volume of `key` lies, or would lie."""
        return self.folder / f"{key}{SUFFIX}"

    def save(self, key: str, volume: torch.Tensor) -> int:
        """Store a prepared volume (1, z, x, y), values in [-1, 1], whole or not at all; returns the file's bytes.

        Raises:
            ValueError: values outside [-1, 1], or not of that shape.
            OSError: the disk is full, or the folder can't be written.
        """
        low, high = map(float, volume.aminmax())
        if volume.ndim != 4 or volume.shape[0] != 1 or not (low >= -1 and high <= 1):  # NaN is neither
            raise ValueError(
                f"shape {tuple(volume.shape)}, values {low:g} to {high:g}: a prepared volume is (1, z, x, y) with "
                "values in [-1, 1], as preprocess gives it"
            )
        slabs = [_compressed(slab.mul(STEPS).round_().short().numpy()) for slab in volume[0].split(SLAB)]
        digests = [hashlib.sha256(slab).hexdigest() for slab in slabs]
        header = json.dumps({"format": FORMAT, "key": key, "shape": volume.shape[1:], "sha256": digests})
        tensors = {_name(i): np.frombuffer(slab, np.uint8) for i, slab in enumerate(slabs)}
        # one entry, as several would come in any order
        content = save(tensors, {"header": hashlib.sha256(header.encode()).hexdigest() + header})
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.path(key)) as temporary:
            temporary.write_bytes(content)
        return len(content)

    def load(self, key: str) -> torch.Tensor | None:
        """A prepared volume, float32 (1, z, x, y); None where there is none or its file is damaged."""
        import blosc2  # here and not above: a machine that only trains may lack it

        try:
            with self._opened(key) as (file, header):
                values = np.empty(header["shape"], np.float32)
                for i, digest in enumerate(header["sha256"]):
                    slab = file.get_tensor(_name(i)).tobytes()
                    if hashlib.sha256(slab).hexdigest() != digest:
                        return None
                    part = values[i * SLAB : (i + 1) * SLAB]
                    blosc2.decompress2(slab, dst=(steps := np.empty(part.shape, np.int16)), nthreads=1)
                    np.divide(steps, np.float32(STEPS), out=part)
        except (OSError, ValueError):
            return None
        return torch.from_numpy(values)[None]

    def has(self, key: str) -> bool:
        """Whether a volume is there with its whole length; `load` finds damage inside too."""
        try:
            with self._opened(key):
                return True
        except (OSError, ValueError):
            return False

    @contextmanager
    def _opened(self, key: str) -> Iterator[tuple[Any, dict]]:
        """The file of `key` and its header; OSError where there is none, ValueError where it is damaged."""
        try:
            with safe_open(self.path(key), framework="numpy") as file:
                stored = (file.metadata() or {}).get("header", "")
                if hashlib.sha256(stored[64:].encode()).hexdigest() != stored[:64]:
                    raise ValueError("its header is not what was written")
                header = json.loads(stored[64:])
                if header["key"] != key:
                    raise ValueError(f"it belongs to key {header['key']}")
                yield file, header
        except SafetensorError as error:
            raise ValueError(str(error)) from error

    def sweep(self) -> None:
        """Remove what processes that were killed while they wrote have left."""
        for left in self.folder.glob(".*.tmp"):
            with suppress(FileNotFoundError):  # another process was quicker
                if time.time() - left.stat().st_mtime > _STALE:
                    left.unlink()


def _name(slab: int) -> str:
    return f"slab.{slab:04}"


def _compressed(values: np.ndarray) -> bytes:
    """Blosc2: bytes of equal weight side by side, then Zstandard. One thread: several would write in any order."""
    import blosc2

    return blosc2.compress2(
        np.ascontiguousarray(values),
        typesize=2,
        codec=blosc2.Codec.ZSTD,
        clevel=1,
        filters=[blosc2.Filter.SHUFFLE],
        filters_meta=[0],
        nthreads=1,
    )


def content_of(row: Mapping) -> str:
    """What identifies a study's content: the manifest's checksum, else the SHA-256 of its file.

    Raises:
        FileNotFoundError: no checksum and no file.
    """
    return checksum_of(row) or digest_of(row["path"])


def checksum_of(row: Mapping) -> str:
    """The manifest's checksum of a row, or "" where it gives none."""
    given = row.get("checksum")
    return given if isinstance(given, str) else ""


def key_of(row: Mapping, content: str, config: PreprocessConfig) -> str:
    """Key in the cache of a row with that content."""
    reading = reading_arguments(row) if has_file(row) else {}
    reading.pop("path", None)  # a data set may be moved
    return cache_key(content, reading, config)


def prepare_row(row: Mapping, content: str, config: PreprocessConfig, cache: VolumeCache) -> int:
    """Read or generate the study of a row, whose content is known, pre-process and store it; returns the file's bytes.

    Raises:
        ValueError: the file can't be read as a CT, or is not the one that the manifest describes.
        OSError: it can't be stored.
    """
    if has_file(row) and checksum_of(row) == content and digest_of(row["path"]) != content:
        raise ValueError(
            f"{row['path']} is not the file whose checksum the manifest gives for {row['study']} "
            f"({content[:12]}...): it was changed or damaged since; get it again, or empty the checksum to accept it"
        )
    return cache.save(key_of(row, content, config), preprocess(volume_from_row(row), config))
