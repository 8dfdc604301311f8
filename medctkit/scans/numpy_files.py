"""NumPy's .npz with one array, as RAD-ChestCT has them: values only, so the caller says how large and how they lie."""

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medctkit.scans.geometry import straight_affine
from medctkit.scans.limits import most_unpacked
from medctkit.scans.stored import Stored, check_shape, damaged, decode


def read_npz(path: Path, spacing: Sequence[float] | None, stored_as: str | None = None) -> Stored:
    """Read the one array (d, h, w), in HU, of a .npz file.

    The caller says how large a voxel is, `spacing` (d, h, w) in mm, and how the axes lie, `stored_as` such as "IPL".
    """
    if spacing is None or stored_as is None:
        raise ValueError(
            "a .npz says neither how large a voxel is nor how it lies; pass spacing=(d, h, w) and stored_as="
        )
    members = decode(lambda: zipfile.ZipFile(path).infolist())
    if [member.filename.endswith(".npy") for member in members] != [True]:
        raise ValueError(f"holds {[member.filename for member in members]}: expected one array")
    if members[0].file_size > most_unpacked(path.stat().st_size):
        raise damaged(f"it claims to unpack to {members[0].file_size} bytes")
    with np.load(path, allow_pickle=False) as arrays:
        hu = decode(lambda: arrays[arrays.files[0]])
    check_shape(hu.shape)
    if hu.dtype.kind not in "iuf":
        raise ValueError(f"values of type {hu.dtype}: Hounsfield units are real numbers")
    return Stored(hu.astype(np.float32), straight_affine(spacing, stored_as), [])
