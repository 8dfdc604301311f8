"""What a file holds, and what is said (in a ValueError) where its header can't be true.

What a header claims is compared with what the file holds before anything of that size is made in memory, and compressed
voxels are checked by their checksum.
"""

import errno
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from medctkit.scans.geometry import CANONICAL

MOST_VOXELS = 2**30  # 4 GiB as float32: 1024 slices of 1024 x 1024 pixels
NO_ORIENTATION = f"the header does not say how the scan lies, {CANONICAL} assumed as in DICOM slices"
NOT_ANALYZE = "Analyze does not say which side is left: let dcm2niix make a NIfTI from the DICOM slices"

_NO_MEMORY = re.compile(r"(?i)bad.?alloc|(out of|insufficient|not enough) mem|(allocat|reserv).*mem|mem.*allocat")

T = TypeVar("T")


class Stored(NamedTuple):
    """What a reader gives."""

    hu: np.ndarray  # float32 (d, h, w), in memory of its own: the caller changes it in place
    affine: np.ndarray  # 4 x 4, from (d, h, w) to RAS mm
    notes: list[str]  # for the provenance
    rescaled: bool | None = False  # its headers brought slope or intercept; None: they should have, the caller must


def files_below(folder: str | os.PathLike) -> list[Path]:
    """All files below a folder, sorted, and below folders that links in it lead to, but for links that lead back.

    Raises:
        OSError: a folder that may not be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    def leads_back(link: Path) -> bool:
        target = link.resolve()
        return link.parent.resolve().is_relative_to(target) or any(p.resolve() == target for p in link.parents)

    files = []
    for root, folders, names in os.walk(str(folder), onerror=refuse, followlinks=True):
        files += [Path(root, name) for name in names]
        folders[:] = [name for name in folders if not ((sub := Path(root, name)).is_symlink() and leads_back(sub))]
    return sorted(files)


def damaged(reason: str, part: str = "") -> ValueError:
    """The error for a broken file; `part` names the file inside a folder."""
    return ValueError(f"{part} can't be read: truncated or damaged; get the file again ({reason})".lstrip())


def is_of_machine(error: Exception) -> bool:
    """Whether an error is no fault of the file: too little memory, or what the system says of the disk."""
    # a place in a damaged header that no file has is an invalid argument, and errors of libraries have no number
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno not in (None, errno.EINVAL))


def decode(read: Callable[[], T], part: str = "") -> T:
    """Run a decoder; whatever it raises on a broken file (each has its own types) becomes the error above.

    Raises:
        MemoryError: too little memory, which is no fault of the file.
        OSError: of this machine, such as a full disk, likewise.
    """
    try:
        return read()
    except Exception as error:
        if is_of_machine(error):
            raise
        if _NO_MEMORY.search(str(error)):  # of libraries in C and C++
            raise MemoryError(str(error).strip().splitlines()[-1]) from error
        if "free space" in str(error):  # NumPy's word for a full disk
            raise OSError(errno.ENOSPC, str(error)) from error
        raise damaged((str(error).strip().splitlines() or [type(error).__name__])[-1], part) from error


def check_shape(shape: Sequence[int]) -> None:
    """Refuse what no CT has: not three axes, an axis without voxels, or more than 2^30 voxels."""
    if min(shape, default=0) < 1:
        raise damaged(f"its header claims {tuple(shape)} voxels")
    if len(shape) != 3:
        raise ValueError(f"{len(shape)}-D, shape {tuple(shape)}: a CT volume has three axes; save the one to read")
    voxels = math.prod(shape)
    if voxels > MOST_VOXELS:
        found = f"its header claims {tuple(shape)} voxels, {voxels * 4 / 2**30:.3g} GiB: more than any CT"
        raise ValueError(f"{found}; get the file again, or cut the scan or make it coarser first")


def check_bytes(found: int, claimed: int, shape: Sequence[int]) -> list[str]:
    """Refuse a file with fewer bytes of voxels than its header describes, or a slice (x, y, z) more; returns notes."""
    if not claimed <= found < claimed + claimed // shape[-1]:
        raise damaged(f"its header describes {claimed} bytes of voxels, and the file holds {found}")
    return [f"{found - claimed} bytes after the voxels passed over"] if found > claimed else []


def check_steps(steps: Sequence[float], blank: bool) -> None:
    """Refuse a header without the size of a voxel (d, h, w): it is `blank`, or a length is no number above 0."""
    if blank:
        raise ValueError("blank header, so the size of a voxel is unknown; pass spacing=(d, h, w) in mm")
    if not all(math.isfinite(step) and step > 0 for step in steps):
        found = f"the size of a voxel in its header is {tuple(steps)} (slices, rows, columns)"
        raise ValueError(f"{found}: expected lengths above 0; pass the right one as spacing=(d, h, w) in mm")
