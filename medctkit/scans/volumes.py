"""CT volumes: one type for every scan, and one function that reads it from any file.

Orientation, stated once. A scan of any format comes out canonical, "SPL": slices from the feet to the head, rows from
front to back, columns from the patient's right to the left. `preprocess` turns any volume to it, and so a patient
reaches the model in one way, however he was stored. It is how the released weights saw CT-RATE (`docs/data.md`).

Shape legend of the package: b batch, c channel, d h w depth (slices), rows, columns.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medctkit.scans.chest import chest_range
from medctkit.scans.formats import reader_of
from medctkit.scans.geometry import (
    CANONICAL,
    STEP_RANGE,
    Lengths,
    check_size,
    checked_orientation,
    checked_spacing,
    nearest_orientation,
    steps_of,
    straight_affine,
    turned_axes,
    with_spacing,
)
from medctkit.scans.hounsfield import check_hu, fill_outside
from medctkit.scans.stored import Stored

_LEAST_COSINE = 0.35  # between an axis and its letter; of the nearest letters it is more, however a scan lies


@dataclass(frozen=True, eq=False)
class CTVolume:
    """A CT scan in Hounsfield units; refuses what no CT volume can have.

    Args:
        hu: values in HU, shape (d, h, w): slices, rows, columns.
        spacing: distance between voxel centres along (d, h, w), mm.
        orientation: three letters of RLAPSI: the side of the patient towards which the index of d, h and w
            grows. In the canonical "SPL" slices run from the feet to the head, rows from front to back and
            columns from the patient's right to the left: the patient's right is on the left of the picture.
        affine: 4 x 4 matrix from the index (d, h, w, 1) to patient coordinates in mm that grow towards right,
            front and head (RAS, as in NIfTI). Made from spacing and orientation where not given.
        provenance: short sentences: where the values came from and what was done to them.
    """

    hu: np.ndarray
    spacing: Lengths
    orientation: str = CANONICAL
    affine: np.ndarray = None  # type: ignore[assignment]  # made below where not given
    provenance: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        hu = np.asarray(self.hu)
        if hu.ndim != 3 or 0 in hu.shape:
            raise ValueError(f"{hu.ndim}-D, shape {hu.shape}: a CT volume has three axes (slices, rows, columns)")
        if hu.dtype.kind not in "iuf":
            raise ValueError(f"values of type {hu.dtype}: Hounsfield units are real numbers")
        if not (np.isfinite(hu.min()) and np.isfinite(hu.max())):  # both pass NaN on, and need no copy
            bad = ~np.isfinite(hu)
            first = "slice {}, row {}, column {}".format(*np.unravel_index(bad.argmax(), hu.shape))
            found = f"{bad.sum()} of {hu.size} voxels have NaN or infinite values, the first at {first}"
            raise ValueError(f"{found}: every voxel needs a value in HU; repair or drop this scan")
        spacing = checked_spacing(self.spacing)
        orientation = checked_orientation(self.orientation)
        affine = straight_affine(spacing, orientation) if self.affine is None else np.array(self.affine, float)
        if affine.shape != (4, 4) or not np.isfinite(affine).all():
            raise ValueError(f"affine {affine.tolist()}: expected 4 x 4 finite numbers")
        if not np.allclose(steps_of(affine), spacing, rtol=1e-2):
            raise ValueError(f"spacing {spacing} mm, but the affine has steps of {steps_of(affine)} mm")
        lies = nearest_orientation(affine)  # refuses axes that span no box
        along = straight_affine((1, 1, 1), orientation)[:3, :3]
        if (np.einsum("ij,ij->j", affine[:3, :3] / spacing, along) < _LEAST_COSINE).any():
            raise ValueError(f"orientation {orientation!r}, but by its affine the volume lies {lies}: correct one")
        affine.flags.writeable = False
        checked = dict(hu=hu, spacing=spacing, orientation=orientation, affine=affine)
        for name, value in {**checked, "provenance": tuple(self.provenance)}.items():
            object.__setattr__(self, name, value)  # frozen for everyone else

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of slices, rows and columns."""
        d, h, w = self.hu.shape
        return d, h, w

    def reoriented(self, orientation: str = CANONICAL) -> "CTVolume":
        """The same scan with its axes swapped and flipped to another orientation; no value is changed."""
        target = checked_orientation(orientation)
        if target == self.orientation:
            return self
        hu, spacing, affine = turned(self, target)
        provenance = (*self.provenance, f"turned from {self.orientation} to {target}")
        return CTVolume(np.ascontiguousarray(hu), spacing, target, affine, provenance)

    def __repr__(self) -> str:
        shape, steps = " x ".join(map(str, self.shape)), " x ".join(f"{step:.4g}" for step in self.spacing)
        values = f"{self.hu.min():.0f} to {self.hu.max():.0f} HU"
        return f"CTVolume({shape} voxels of {steps} mm, {self.orientation}, {values}, {self.hu.dtype})"


def turned(volume: CTVolume, orientation: str = CANONICAL) -> tuple[np.ndarray, Lengths, np.ndarray]:
    """Values (a view), spacing and affine of a volume in another orientation; see `CTVolume.reoriented`."""
    order, flipped = turned_axes(volume.orientation, orientation)
    to_old_index = np.diag([0.0, 0, 0, 1])
    to_old_index[order, range(3)] = 1
    for new in flipped:
        to_old_index[order[new], [new, 3]] = -1, volume.shape[order[new]] - 1
    d, h, w = (volume.spacing[old] for old in order)
    return np.flip(volume.hu.transpose(order), flipped), (d, h, w), volume.affine @ to_old_index


def read_volume(
    path: str | os.PathLike,
    rescale_slope: float | None = None,
    rescale_intercept: float | None = None,
    spacing: Sequence[float] | None = None,
    *,
    orientation: str = "canonical",
    stored_as: str | None = None,
    crop: str | None = None,
    largest_gap: float = STEP_RANGE[1],
    **choices: Any,
) -> CTVolume:
    """Read a CT scan in one of the formats of `formats.READERS`, in float32 Hounsfield units.

    Args:
        path: a file (.nii, .nii.gz, .nrrd, .nhdr, .mha, .mhd), or a folder or .zip with the slices of a DICOM
            series.
        rescale_slope: HU = value * slope + intercept, for files that hold stored values (CT-RATE version 1:
            RescaleSlope of its metadata). Leave out for files in HU (CT-RATE version 2, most others).
        rescale_intercept: see `rescale_slope`.
        spacing: (d, h, w) in mm as stored, in place of a blank or wrong header (CT-RATE: ZSpacing, XYSpacing
            twice).
        orientation: "canonical" (SPL), "stored" or three letters of RLAPSI.
        stored_as: how the array (d, h, w) of the file lies, three letters, in place of a blank or wrong header
            (CT-RATE version 1: "SPL").
        crop: "chest" cuts a longer scan along the body to the lungs and 4 cm on either side.
        largest_gap: mm from slice to slice that are still read as one volume; more than 20 for sparse HRCT, where the
            model sees between two slices something in between.
        choices: of DICOM: `series`, which of several: its SeriesInstanceUID, SeriesNumber or SeriesDescription;
            `acquisition`, which of several scans in one series; `resample=True` shears tilted slices straight and
            interpolates between uneven ones (see `dicom_series.read_dicom`).

    Raises:
        OSError: nothing at `path`, or it may not be read.
        MemoryError: too little memory for this scan.
        ValueError: the file can't be read, is not a CT, not in HU, not of the size of a chest, or has a geometry that
            can't be right. The message names the file, what was found and the way out.
    """
    if not os.fspath(path):
        raise ValueError("the path of the scan is empty; give a file, or the folder of a DICOM series")
    path = Path(os.path.expanduser(path))
    reader = reader_of(path)
    try:
        target = _target(orientation)
        rescale = _rescale(rescale_slope, rescale_intercept)
        if crop not in (None, "chest"):
            raise ValueError(f"crop={crop!r}: expected 'chest', or None for the whole scan")
        choices = {name: value for name, value in choices.items() if value is not None}
        for name in choices.keys() - set(reader.choices):
            raise ValueError(f"{name}={choices[name]!r} chooses nothing: a {reader.name} has {reader.choices}")
        if stored_as is not None:
            stored_as = checked_orientation(stored_as)
            choices |= {"stored_as": stored_as} if "stored_as" in reader.choices else {}
        stored = reader.read(path, spacing, **choices)
        hu, notes = stored.hu, [f"read from {reader.name} {path.name}", *stored.notes]
        notes += _to_hu(stored, rescale, (rescale_slope, rescale_intercept) != (None, None))
        affine = with_spacing(stored.affine, spacing)
        if stored_as is not None:
            affine = straight_affine(steps_of(affine), stored_as)
            notes.append(f"taken to lie {stored_as}, as asked for")
        if spacing is not None:
            notes.append(f"spacing {tuple(spacing)} mm, as asked for")
        lies, steps = nearest_orientation(affine), steps_of(affine)
        body = next(axis for axis, letter in enumerate(lies) if letter in "SI")
        if crop:
            hu, affine, kept = _cut_chest(hu, affine, body)
            notes.append(kept)
        check_size(steps, hu.shape, stored.notes, body, largest_gap)
        if target in (None, lies):
            notes.append("orientation as stored" if target is None else f"lies {lies} already, nothing turned")
        volume = CTVolume(hu, steps, lies, affine, tuple(notes))
        check_hu(hu, rescale)
        return volume if target is None else volume.reoriented(target)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except MemoryError as error:
        raise MemoryError(f"{path}: too little memory to read it; close other programs ({error})") from error


def _to_hu(stored: Stored, rescale: tuple[float, float], asked: bool) -> list[str]:
    """Rescale in place, as every reader gives an array of its own, and put air where nothing was scanned; notes."""
    if not asked and stored.rescaled is None:
        raise ValueError("its headers lack slope and intercept; pass rescale_slope and rescale_intercept")
    if asked and stored.rescaled:
        raise ValueError("its headers have a slope and intercept of their own; leave out the caller's")
    if not asked:
        return fill_outside(stored.hu)
    slope, intercept = rescale
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused later
        np.add(np.multiply(stored.hu, slope, out=stored.hu), intercept, out=stored.hu)
    return [f"HU = value * {slope:g} + {intercept:g}, as asked for", *fill_outside(stored.hu)]


def _cut_chest(hu: np.ndarray, affine: np.ndarray, body: int) -> tuple[np.ndarray, np.ndarray, str]:
    """The part of a scan along its axis `body` that holds the lungs, its affine and a note."""
    order = [body, *({0, 1, 2} - {body})]
    first, last = chest_range(hu.transpose(order), [steps_of(affine)[axis] for axis in order])
    moved = affine.copy()
    moved[:3, 3] += affine[:3, body] * first
    note = f"the chest cut out: slices {first} to {last} of {hu.shape[body]}"
    return np.ascontiguousarray(hu[(slice(None),) * body + (slice(first, last + 1),)]), moved, note


def _target(orientation: str) -> str | None:
    """The letters to turn a scan to; None: as stored."""
    if orientation == "stored":
        return None
    try:
        return CANONICAL if orientation == "canonical" else checked_orientation(orientation)
    except ValueError as error:
        raise ValueError(f"{error}, or 'stored' or 'canonical'") from None


def _rescale(slope: float | None, intercept: float | None) -> tuple[float, float]:
    try:
        numbers = float(1 if slope is None else slope), float(0 if intercept is None else intercept)
    except (TypeError, ValueError):
        numbers = (np.nan, np.nan)
    if not (np.isfinite(numbers).all() and numbers[0] > 0):
        found = f"rescale_slope={slope!r}, rescale_intercept={intercept!r}"
        raise ValueError(f"{found}: expected finite numbers, slope above 0")
    return numbers
