"""NIfTI files, read by nibabel from a header that was checked."""

import gzip
import math
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np
from nibabel import Nifti1Header

from medctkit.scans.geometry import (
    CANONICAL,
    checked_spacing,
    nearest_orientation,
    steps_of,
    straight_affine,
    with_spacing,
)
from medctkit.scans.limits import check_claim
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

_UNITS = {0: (1, ""), 1: (1000, "metres"), 2: (1, ""), 3: (0.001, "micrometres")}  # NIfTI code: mm, name


def read_nifti(path: Path, spacing: Sequence[float] | None, stored_as: str | None = None) -> Stored:
    """Read a .nii or .nii.gz file: the array (x, y, z) becomes (d, h, w) = (z, y, x), neither flipped nor turned.

    Args:
        path: a NIfTI-1 or -2 file.
        spacing: (d, h, w) in mm in place of the header's; None: the header's.
        stored_as: how (d, h, w) lie, in place of the header's orientation; None: the header's.
    """
    packed = path.name.lower().endswith(".gz")
    _check_packing(path, packed)
    with gzip.open(path) if packed else open(path, "rb") as file:
        header = _header(decode(lambda: file.read(540)))
        shape = tuple(map(int, header.get_data_shape()))
        while len(shape) > 3 and shape[-1] == 1:  # (x, y, z, 1) is how some programs save a single volume
            shape = shape[:-1]
        dtype, size = _dtype(header), path.stat().st_size
        check_shape(shape)
        claimed, offset = math.prod(shape) * dtype.itemsize, decode(header.get_data_offset)
        if packed:
            check_claim(shape, dtype.itemsize, size)
        else:
            check_bytes(max(size - offset, 0), claimed, shape)
        decode(lambda: file.seek(offset))
        data = decode(lambda: file.read(claimed))
        more = decode(lambda: _after_voxels(file, claimed // shape[-1]))
    notes = check_bytes(len(data) + more, claimed, shape)
    # (x, y, z) -> d h w: the file runs along x first, so this is its own order
    hu = np.frombuffer(data, dtype).reshape(shape[2::-1]).astype(np.float32)
    axes = int(header["dim"][0])
    notes += [f"{axes}-D with nothing along the axes after the third"] if axes > 3 else []
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
    affine, about_affine = _affine(header, spacing, stored_as)
    return Stored(hu, affine, notes + about_affine)


def _after_voxels(file: BinaryIO | gzip.GzipFile, most: int) -> int:
    """How many bytes follow, up to `most`; to know it, gzip compares its checksum at the end of its stream."""
    try:
        return len(file.read(most))
    except gzip.BadGzipFile as error:
        if "Not a gzipped file" in str(error):  # what follows is no stream of its own, as the checksum was right
            return 1
        raise


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


def _header(start: bytes) -> Nifti1Header:
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
    header = decode(lambda: (nib.Nifti1Header if size == 348 else nib.Nifti2Header)(start[:size], check=False))
    if not header["vox_offset"] >= size + 4:  # NaN is not
        raise damaged(f"by its header voxels start at byte {header['vox_offset']}, inside of the header")
    return header


def _dtype(header: Nifti1Header) -> np.dtype:
    try:
        dtype = header.get_data_dtype()
    except KeyError as error:
        raise damaged(f"its header has the type of voxel {error}, which does not exist") from error
    if dtype.kind not in "iuf":
        raise ValueError(f"voxels of type {dtype} (colour or complex): not a CT")
    return dtype


def _affine(
    header: Nifti1Header, spacing: Sequence[float] | None, stored_as: str | None
) -> tuple[np.ndarray, list[str]]:
    """Affine from (d, h, w) to RAS mm, and notes."""
    code = int(header["xyzt_units"]) & 7 if spacing is None else 2
    if code not in _UNITS:
        raise damaged(f"its header has the unit of length {code}, which does not exist")
    to_mm, units = _UNITS[code]
    notes = [f"lengths in the header are {units}, turned into mm"] if units else []
    if spacing is not None:
        header["pixdim"][1:4] = np.divide(checked_spacing(spacing), to_mm)[::-1]
    pixdim = header["pixdim"][3:0:-1].astype(float).tolist()
    check_steps(pixdim, blank=False)
    steps = tuple(round(step * to_mm, 6) for step in pixdim)
    given = [name for name in ("sform", "qform") if header[f"{name}_code"] > 0 and stored_as is None]
    if not given:
        check_steps(steps, blank=spacing is None and steps == (1, 1, 1))
        if stored_as is None:
            notes.append(NO_ORIENTATION)
        return straight_affine(steps, stored_as or CANONICAL), notes
    forms, unusable = {}, []
    for name in given:
        try:
            forms[name] = _form(header, name, to_mm)
        except ValueError as error:
            unusable.append(f"{name}: {error}")
    if not forms:
        raise ValueError("; ".join(unusable))
    notes += [f"passed over the {found}" for found in unusable]
    letters = {name: nearest_orientation(form) for name, form in forms.items()}
    if len(set(letters.values())) > 1:
        found = f"by its sform the scan lies {letters['sform']}, by its qform {letters['qform']}"
        raise ValueError(f"the header contradicts itself: {found}; pass the right one as stored_as=")
    affine = with_spacing(next(iter(forms.values())), spacing)
    if not np.allclose(steps_of(affine), steps, rtol=1e-2):
        found = f"pixdim {steps} mm, affine {steps_of(affine)} mm (slices, rows, columns)"
        raise ValueError(f"the header contradicts itself: {found}; pass the right one as spacing=(d, h, w)")
    return affine, notes


def _form(header: Nifti1Header, name: str, to_mm: float) -> np.ndarray:
    """The sform or qform of a header, from (d, h, w) to mm; refuses one that spans no box."""
    try:
        if header["pixdim"][0] == 0:  # which NIfTI takes for 1
            header["pixdim"][0] = 1
        with np.errstate(invalid="ignore", over="ignore"):
            form = header.get_sform() if name == "sform" else header.get_qform()
    except Exception as error:  # numpy's and nibabel's, for quaternions that are none
        raise ValueError(f"the {name} in the header is unusable: {error}") from error
    form = np.diag([to_mm, to_mm, to_mm, 1]) @ form[:, [2, 1, 0, 3]].astype(float)
    with_spacing(form, (1, 1, 1))
    return form
