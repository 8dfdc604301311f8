"""NIfTI files, read by nibabel from a header that was checked."""

import gzip
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medctkit.scans.geometry import (
    CANONICAL,
    checked_spacing,
    nearest_orientation,
    steps_of,
    straight_affine,
    with_spacing,
)
from medctkit.scans.stored import (
    NO_ORIENTATION,
    NOT_ANALYZE,
    Stored,
    check_bytes,
    check_shape,
    check_steps,
    damaged,
    decode,
)

if TYPE_CHECKING:
    from nibabel import Nifti1Header

_GZIP_RATIO = 1032  # gzip can't make data smaller than this
_UNITS = {0: (1, ""), 1: (1000, "metres"), 2: (1, ""), 3: (0.001, "micrometres")}  # NIfTI code: mm, name


def read_nifti(path: Path, spacing: Sequence[float] | None) -> Stored:
    """Read a .nii or .nii.gz file: the array (x, y, z) becomes (d, h, w) = (z, y, x), neither flipped nor turned.

    Args:
        path: a NIfTI-1 or -2 file.
        spacing: (d, h, w) in mm in place of the header's; None: the header's.
    """
    packed = path.name.lower().endswith(".gz")
    _check_packing(path, packed)
    with gzip.open(path) if packed else open(path, "rb") as file:
        header = _header(decode(lambda: file.read(540)))
        shape = tuple(map(int, header.get_data_shape()))
        while len(shape) > 3 and shape[-1] == 1:  # (x, y, z, 1) is how some programs save a single volume
            shape = shape[:-1]
        check_shape(shape)
        dtype = _dtype(header)
        claimed, offset, size = math.prod(shape) * dtype.itemsize, decode(header.get_data_offset), path.stat().st_size
        if not packed:
            check_bytes(max(size - offset, 0), claimed)
        elif claimed > size * _GZIP_RATIO:
            raise damaged(f"its header describes {claimed} bytes of voxels, too many for {size} compressed bytes")
        decode(lambda: file.seek(offset))
        # one byte more than there should be: gzip compares its checksum at the end of the file
        data = decode(lambda: file.read(claimed + 1))
    if len(data) > claimed:
        raise damaged(f"it goes on after the {claimed} bytes of voxels that its header describes")
    check_bytes(len(data), claimed)
    # (x, y, z) -> d h w: the file runs along x first, so this is its own order
    hu = np.frombuffer(data, dtype).reshape(shape[2::-1]).astype(np.float32)
    axes = int(header["dim"][0])
    notes = [f"{axes}-D with nothing along the axes after the third"] if axes > 3 else []
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or math.isnan(slope):  # how NIfTI says "not scaled"
        slope, intercept = 1, 0
    if not (math.isfinite(slope) and math.isfinite(intercept)):
        raise damaged(f"its header scales voxels with scl_slope {slope}, scl_inter {intercept}")
    if (slope, intercept) != (1, 0):
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused later
            hu *= slope
            hu += intercept
        notes.append(f"value * {slope:g} + {intercept:g} of the NIfTI header applied")
    affine, about_affine = _affine(header, spacing)
    return Stored(hu, affine, notes + about_affine)


def _check_packing(path: Path, packed: bool) -> None:
    with open(path, "rb") as file:
        start = file.read(4)
    if not start:
        raise damaged("it is empty")
    if packed and _header_size(start):
        raise ValueError("not compressed, in spite of its name; rename it to .nii")
    gzipped = start[:2] == b"\x1f\x8b"
    if packed and not gzipped:
        raise ValueError(f"can't be read: not a compressed file, in spite of its name; it starts with {start!r}")
    if gzipped and not packed:
        raise ValueError("compressed, in spite of its name; rename it to .nii.gz")


def _header_size(start: bytes) -> int:
    """348 for the start of a NIfTI-1 (or Analyze) header, 540 for NIfTI-2, 0 for anything else."""
    return next((n for n in (348, 540) for order in ("little", "big") if start[:4] == n.to_bytes(4, order)), 0)


def _header(start: bytes) -> "Nifti1Header":
    import nibabel as nib

    size = _header_size(start)
    if not size:
        raise damaged(f"it has no NIfTI header; it starts with {start[:4]!r}")
    if len(start) < size:
        raise damaged(f"its header ends after {len(start)} of {size} bytes")
    magic = start[344:348] if size == 348 else start[4:12]
    if magic[:3] in (b"ni1", b"ni2"):
        raise ValueError("the header of a NIfTI pair (.hdr with .img), without voxels; save the pair as one .nii.gz")
    if magic not in (b"n+1\0", b"n+2\0\r\n\x1a\n"):
        raise ValueError(f"an Analyze file or a damaged NIfTI header (its mark is {magic!r}); {NOT_ANALYZE}")
    return decode(lambda: (nib.Nifti1Header if size == 348 else nib.Nifti2Header)(start[:size], check=False))


def _dtype(header: "Nifti1Header") -> np.dtype:
    try:
        dtype = header.get_data_dtype()
    except KeyError as error:
        raise damaged(f"its header has the type of voxel {error}, which does not exist") from error
    if dtype.kind not in "iuf":
        raise ValueError(f"voxels of type {dtype} (colour or complex): not a CT")
    return dtype


def _affine(header: "Nifti1Header", spacing: Sequence[float] | None) -> tuple[np.ndarray, list[str]]:
    """Affine from (d, h, w) to RAS mm, and notes."""
    code = int(header["xyzt_units"]) & 7
    if code not in _UNITS:
        raise damaged(f"its header has the unit of length {code}, which does not exist")
    to_mm, units = _UNITS[code]
    notes = [f"lengths in the header are {units}, turned into mm"] if units else []
    if spacing is not None:
        header["pixdim"][1:4] = np.divide(checked_spacing(spacing), to_mm)[::-1]
    pixdim = header["pixdim"][3:0:-1].astype(float).tolist()
    check_steps(pixdim, blank=False)
    steps = tuple(round(step * to_mm, 6) for step in pixdim)
    forms = {name: _form(header, name, to_mm) for name in ("sform", "qform") if header[f"{name}_code"] > 0}
    if not forms:
        check_steps(steps, blank=spacing is None and steps == (1, 1, 1))
        return straight_affine(steps, CANONICAL), [*notes, NO_ORIENTATION]
    letters = {name: nearest_orientation(form) for name, form in forms.items()}
    if len(set(letters.values())) > 1:
        found = f"by its sform the scan lies {letters['sform']}, by its qform {letters['qform']}"
        way_out = "drop the wrong one with nibabel: image.set_sform(None, code=0) or image.set_qform(None, code=0)"
        raise ValueError(f"the header contradicts itself: {found}; {way_out}")
    affine = with_spacing(next(iter(forms.values())), spacing)
    if not np.allclose(steps_of(affine), steps, rtol=1e-2):
        found = f"pixdim {steps} mm, affine {steps_of(affine)} mm (slices, rows, columns)"
        raise ValueError(f"the header contradicts itself: {found}; pass the right one as spacing=(d, h, w)")
    return affine, notes


def _form(header: "Nifti1Header", name: str, to_mm: float) -> np.ndarray:
    """The sform or qform of a header, from (d, h, w) to mm."""
    try:
        with np.errstate(invalid="ignore", over="ignore"):
            form = header.get_sform() if name == "sform" else header.get_qform()
    except Exception as error:  # numpy's and nibabel's, for quaternions that are none
        raise ValueError(f"the {name} in the header is unusable: {error}") from error
    return np.diag([to_mm, to_mm, to_mm, 1]) @ form[:, [2, 1, 0, 3]].astype(float)
