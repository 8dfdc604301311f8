"""Where the voxels of a scan lie in the patient: orientation letters, spacing, affines.

Patient coordinates are in mm and grow towards the patient's right, front and head (RAS, as in NIfTI). A letter of
RLAPSI names the side of the patient towards which the index of an axis grows. What is refused is a ValueError.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

Lengths = tuple[float, float, float]  # mm

CANONICAL = "SPL"  # slices from feet to head, rows from front to back, columns from right to left

# letter -> patient axis (right-left, back-front, feet-head), and whether RAS coordinates grow towards it
LETTERS = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}
STEP_RANGE = (0.05, 20.0)  # mm between voxels
# Millimetres that a scan covers along an axis. One turn of a 64-row scanner covers 40: less is no chest, or has the
# wrong spacing. 850 is the widest extended field of large-bore scanners. A scan longer than 700 goes far beyond the
# chest, and the model's 360 mm would be cut from its middle, the belly.
_EXTENT_RANGE, _LONGEST = (40.0, 850.0), 700.0
_FARTHEST = 1e6  # mm from the scanner's middle
_MOST_SHEAR = 1.0  # degrees that two axes may be away from a right angle


def checked_spacing(spacing: Sequence[float], axes: str = "(d, h, w)") -> Lengths:
    """Spacing as three floats, rounded as `steps_of` does; refuses all but three positive lengths."""
    try:
        d, h, w = (round(float(step), 6) for step in spacing)
    except (TypeError, ValueError):
        d = h = w = np.nan
    if not (np.isfinite((d, h, w)).all() and min(d, h, w) > 0):
        raise ValueError(f"spacing {spacing!r}: expected three positive lengths in mm {axes}")
    return d, h, w


def checked_orientation(orientation: str) -> str:
    """Orientation in capital letters; refuses one that does not name one direction of each patient axis."""
    letters = str(orientation).upper()
    if sorted(LETTERS.get(letter, (-1,))[0] for letter in letters) != [0, 1, 2]:
        raise ValueError(f"orientation {orientation!r}: expected one each of R/L, A/P and S/I, such as 'SPL'")
    return letters


def turned_axes(orientation: str, target: str = CANONICAL) -> tuple[list[int], tuple[int, ...]]:
    """What turns an array from one orientation to another: its axes in their new order, and the new ones to flip."""
    axes = [LETTERS[letter][0] for letter in orientation]
    order = [axes.index(LETTERS[letter][0]) for letter in target]
    return order, tuple(new for new, old in enumerate(order) if target[new] != orientation[old])


def steps_of(affine: np.ndarray) -> Lengths:
    """Length in mm of one step of d, h and w; rounded, as headers hold float32 (0.75 must stay 0.75)."""
    d, h, w = (round(step, 6) for step in np.linalg.norm(affine[:3, :3], axis=0).tolist())
    return d, h, w


def straight_affine(spacing: Sequence[float], orientation: str) -> np.ndarray:
    """Affine (4, 4) of a volume that lies straight in the scanner, with its first voxel at the origin."""
    affine = np.diag([0.0, 0, 0, 1])
    for column, (step, letter) in enumerate(zip(spacing, orientation, strict=True)):
        axis, sign = LETTERS[letter]
        affine[axis, column] = sign * step
    return affine


def ras_affine(axes: np.ndarray, origin: ArrayLike) -> np.ndarray:
    """Affine from the steps of d, h, w (columns) and the first voxel in the LPS mm of DICOM and ITK."""
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = axes, origin
    affine[:2] *= -1
    return affine


def with_spacing(affine: np.ndarray, spacing: Sequence[float] | None) -> np.ndarray:
    """The affine with its directions kept and its steps replaced, where `spacing`, in mm, is given."""
    if spacing is None:
        return affine
    return affine @ np.diag([*np.divide(checked_spacing(spacing), _lengths(affine)), 1])


def nearest_orientation(affine: np.ndarray) -> str:
    """The orientation letters nearest to an affine (4, 4), which may be oblique; refuses axes not at right angles."""
    from nibabel.orientations import aff2axcodes

    unit = affine[:3, :3] / _lengths(affine)
    cosines = np.abs(np.triu(unit.T @ unit, 1))
    shear = np.degrees(np.arcsin(min(1.0, cosines.max())))
    if shear > _MOST_SHEAR:
        found = f"the axes in the header are {shear:.1f} degrees away from a right angle"
        raise ValueError(f"{found}: a tilted gantry, a registration? Let dcm2niix make a straight file from the slices")
    return "".join(aff2axcodes(affine))


def check_size(
    spacing: Sequence[float],
    shape: Sequence[int],
    notes: Sequence[str] = (),
    body: int = 0,
    largest_gap: float = STEP_RANGE[1],
) -> None:
    """Refuse voxels (d, h, w) of `spacing` mm that can't be the scan of a chest.

    `notes` say what was done to the spacing; a step along axis `body` may have `largest_gap` mm.
    """
    said = f" ({'; '.join(notes)})" if notes else ""
    low, high = STEP_RANGE
    if not all(low <= step <= (largest_gap if axis == body else high) for axis, step in enumerate(spacing)):
        found = f"spacing {tuple(spacing)} mm (slices, rows, columns) is none of a CT, which has {low} to {high} mm"
        sparse = f", or largest_gap={spacing[body]:g} if it is a sparse HRCT" if high < spacing[body] <= 100 else ""
        raise ValueError(f"{found}; pass the right one as spacing=(d, h, w){sparse}{said}")
    low, high = _EXTENT_RANGE
    extent = [n * step for n, step in zip(shape, spacing, strict=True)]
    if not all(low <= length <= (_LONGEST if axis == body else high) for axis, length in enumerate(extent)):
        covered = " x ".join(f"{length:.4g}" for length in extent)
        cut = ', or crop="chest" to cut the chest out' if extent[body] > _LONGEST else ""
        raise ValueError(
            f"{' x '.join(map(str, shape))} voxels of {tuple(spacing)} mm (slices, rows, columns) cover {covered} mm, "
            f"a chest {low:g} to {_LONGEST:g} mm along the body, {high:g} across; pass the right spacing=(d, h, w)"
            f"{cut}{said}"
        )


def _lengths(affine: np.ndarray) -> np.ndarray:
    """Lengths of the three axes in mm, none of them 0."""
    if np.isfinite(affine).all() and np.abs(affine).max() < _FARTHEST:
        lengths = np.linalg.norm(affine[:3, :3], axis=0)
        # a determinant near 0: two axes point the same way
        if lengths.all() and abs(np.linalg.det(affine[:3, :3] / lengths)) > 1e-3:
            return lengths
    found = f"the affine in the header is unusable, as it does not span a box: {affine.tolist()}"
    raise ValueError(f"{found}; get the file again, or make it anew from the DICOM slices")
