"""CT volumes: one type for every scan, and one function that reads it from any file.

Orientation, stated once. A NIfTI file is kept as it is stored, because that is what the released weights saw
in training: the array (x, y, z) becomes (d, h, w) = (z, y, x). DICOM, NRRD and MetaImage are turned to the
canonical "SPL", the radiological display. `read_volume(path, orientation=...)` asks for another, and
`CTVolume.reoriented` turns any volume to any orientation. The provenance says what was done.

Shape legend of the package: b batch, c channel, d h w depth (slices), rows, columns.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medctkit.scans.formats import reader_of
from medctkit.scans.geometry import (
    CANONICAL,
    LETTERS,
    Lengths,
    check_size,
    checked_orientation,
    checked_spacing,
    nearest_orientation,
    steps_of,
    straight_affine,
    with_spacing,
)
from medctkit.scans.hounsfield import check_hu


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
        patient_axes = [LETTERS[letter][0] for letter in self.orientation]
        order = [patient_axes.index(LETTERS[letter][0]) for letter in target]
        flipped = tuple(new for new, old in enumerate(order) if target[new] != self.orientation[old])
        to_old_index = np.diag([0.0, 0, 0, 1])
        to_old_index[order, range(3)] = 1
        for new in flipped:
            to_old_index[order[new], [new, 3]] = -1, self.shape[order[new]] - 1
        hu = np.ascontiguousarray(np.flip(self.hu.transpose(order), flipped))
        d, h, w = (self.spacing[old] for old in order)
        provenance = (*self.provenance, f"turned from {self.orientation} to {target}")
        return CTVolume(hu, (d, h, w), target, self.affine @ to_old_index, provenance)

    def __repr__(self) -> str:
        shape, steps = " x ".join(map(str, self.shape)), " x ".join(f"{step:.4g}" for step in self.spacing)
        values = f"{self.hu.min():.0f} to {self.hu.max():.0f} HU"
        return f"CTVolume({shape} voxels of {steps} mm, {self.orientation}, {values}, {self.hu.dtype})"


def read_volume(
    path: str | os.PathLike,
    rescale_slope: float | None = None,
    rescale_intercept: float | None = None,
    spacing: Sequence[float] | None = None,
    *,
    orientation: str | None = None,
    series: str | None = None,
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
        orientation: "stored", "canonical" (SPL) or three letters of RLAPSI; None: "stored" for NIfTI, else "canonical".
        series: which of several DICOM series: its SeriesInstanceUID, SeriesNumber or SeriesDescription.

    Raises:
        OSError: nothing at `path`, or it may not be read.
        ValueError: the file can't be read, is not a CT, not in HU, not of the size of a chest, or has a geometry that
            can't be right. The message names the file, what was found and the way out.
    """
    if not os.fspath(path):
        raise ValueError("the path of the scan is empty; give a file, or the folder of a DICOM series")
    path = Path(os.path.expanduser(path))
    reader = reader_of(path)
    try:
        target = _target(reader.default_orientation if orientation is None else orientation)
        slope, intercept = _rescale(rescale_slope, rescale_intercept)
        if series is not None and not reader.folders:
            raise ValueError(f"series={series!r} chooses one of several DICOM series; a {reader.name} holds one scan")
        stored = reader.read(path, spacing, series) if reader.folders else reader.read(path, spacing)
        hu, affine = stored.hu, with_spacing(stored.affine, spacing)
        notes = [f"read from {reader.name} {path.name}", *stored.notes]
        if (rescale_slope, rescale_intercept) != (None, None):
            if stored.rescaled:
                raise ValueError("its headers have a slope and intercept of their own; leave out the caller's")
            with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused below
                hu *= slope  # in place: every reader gives an array of its own
                hu += intercept
            notes.append(f"HU = value * {slope:g} + {intercept:g}, as asked for")
        if spacing is not None:
            notes.append(f"spacing {tuple(spacing)} mm, as asked for")
        lies, steps = nearest_orientation(affine), steps_of(affine)
        check_size(steps, hu.shape, stored.notes)
        if target in (None, lies):
            notes.append("orientation as stored" if target is None else f"lies {lies} already, nothing turned")
        volume = CTVolume(hu, steps, lies, affine, tuple(notes))
        check_hu(hu, (slope, intercept))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return volume if target is None else volume.reoriented(target)


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
