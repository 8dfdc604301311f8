"""CT volumes: one type for every scan, and one reader for every file format.

Orientation, stated once. A NIfTI file is kept as it is stored, because that is what the released weights saw
in training. DICOM, NRRD and MetaImage are turned to the canonical orientation "SPL", the radiological
display. `CTVolume.reoriented` turns any volume to any orientation.

Shape legend of the package: b batch, c channel, d h w depth (slices), rows, columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medctkit.dicom import decode, is_dicom, read_series

CANONICAL = "SPL"
NIFTI = (".nii", ".nii.gz")
ITK = (".nrrd", ".nhdr", ".mha", ".mhd")

# letter -> patient axis (right-left, back-front, feet-head), and whether RAS coordinates grow towards it
_LETTERS = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}
_HU_RANGE = (-8192, 32767)  # scanners fill what they did not see with values down to -8192
_STEP_RANGE = (0.05, 20.0)  # mm between voxels
_AIR, _LEAST_AIR = (-1200, -300), 0.005
_SOFT_TISSUE, _LEAST_SOFT_TISSUE = (-300, 300), 0.03


@dataclass(frozen=True, eq=False)
class CTVolume:
    """A CT scan in Hounsfield units.

    Args:
        hu: values in HU, shape (d, h, w): slices, rows, columns.
        spacing: distance between voxel centres along (d, h, w), mm.
        orientation: three letters of RLAPSI: the side of the patient towards which the index of d, h and w
            grows. In the canonical "SPL" slices run from the feet to the head, rows from front to back and
            columns from the patient's right to the left: the patient's right is on the left of the picture.
        affine: 4 x 4 matrix from the index (d, h, w, 1) to patient coordinates in mm that grow towards right,
            front and head (RAS, as in NIfTI). Made from spacing and orientation where not given.
        provenance: short sentences: where the values came from and what was done to them.

    Raises:
        ValueError: values, spacing, orientation or affine that no CT volume can have.
    """

    hu: np.ndarray
    spacing: tuple[float, float, float]
    orientation: str = CANONICAL
    affine: np.ndarray | None = None
    provenance: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        hu = np.asarray(self.hu)
        if hu.ndim != 3 or 0 in hu.shape:
            raise ValueError(f"{hu.ndim}-D, shape {hu.shape}: a CT volume has three axes (slices, rows, columns)")
        if hu.dtype.kind not in "iuf":
            raise ValueError(f"values of type {hu.dtype}: Hounsfield units are real numbers")
        if not (np.isfinite(hu.min()) and np.isfinite(hu.max())):  # both pass NaN on, and need no copy
            raise ValueError("NaN or infinite values: every voxel needs a value in HU; repair or drop this scan")
        spacing = _checked_spacing(self.spacing)
        orientation = _checked_orientation(self.orientation)
        affine = _straight_affine(spacing, orientation) if self.affine is None else np.array(self.affine, float)
        if affine.shape != (4, 4) or not np.isfinite(affine).all():
            raise ValueError(f"affine {affine.tolist()}: expected 4 x 4 finite numbers")
        if not np.allclose(_steps(affine), spacing, rtol=1e-2):
            raise ValueError(f"spacing {spacing} mm, but the affine has steps of {_steps(affine)} mm")
        affine.flags.writeable = False
        checked = dict(hu=hu, spacing=spacing, orientation=orientation, affine=affine)
        for name, value in {**checked, "provenance": tuple(self.provenance)}.items():
            object.__setattr__(self, name, value)  # frozen for everyone else

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of slices, rows and columns."""
        return self.hu.shape

    @property
    def extent_mm(self) -> tuple[float, float, float]:
        """Size of the scanned box along (d, h, w), mm."""
        return tuple(n * step for n, step in zip(self.shape, self.spacing, strict=True))

    def reoriented(self, orientation: str = CANONICAL) -> "CTVolume":
        """The same scan with its axes swapped and flipped to another orientation; no value is changed.

        Args:
            orientation: three letters, as in the class.

        Raises:
            ValueError: `orientation` does not name one direction of each patient axis.
        """
        target = _checked_orientation(orientation)
        if target == self.orientation:
            return self
        patient_axes = [_LETTERS[letter][0] for letter in self.orientation]
        order = [patient_axes.index(_LETTERS[letter][0]) for letter in target]
        flipped = [new for new, old in enumerate(order) if target[new] != self.orientation[old]]
        to_old_index = np.zeros((4, 4))
        to_old_index[order, range(3)] = to_old_index[3, 3] = 1
        for new in flipped:
            to_old_index[order[new], new] = -1
            to_old_index[order[new], 3] = self.shape[order[new]] - 1
        return CTVolume(
            np.ascontiguousarray(np.flip(self.hu.transpose(order), flipped)),
            tuple(self.spacing[old] for old in order),
            target,
            self.affine @ to_old_index,
            (*self.provenance, f"turned from {self.orientation} to {target}"),
        )

    def __repr__(self) -> str:
        shape, steps = " x ".join(map(str, self.shape)), " x ".join(f"{step:.4g}" for step in self.spacing)
        values = f"{self.hu.min():.0f} to {self.hu.max():.0f} HU"
        return f"CTVolume({shape} voxels of {steps} mm, {self.orientation}, {values}, {self.hu.dtype})"


def read_volume(
    path: str | Path,
    rescale_slope: float | None = None,
    rescale_intercept: float | None = None,
    spacing: Sequence[float] | None = None,
) -> CTVolume:
    """Read a CT scan: a NIfTI, NRRD or MetaImage file, or a folder with one DICOM series.

    NIfTI keeps its stored orientation: the array (x, y, z) becomes (d, h, w) = (z, y, x), neither flipped nor
    turned. Everything else comes out as "SPL".

    Args:
        path: a file (.nii, .nii.gz, .nrrd, .nhdr, .mha, .mhd), or a folder with the slices of a DICOM series.
        rescale_slope: HU = value * slope + intercept, for files that hold stored values (CT-RATE version 1:
            RescaleSlope of its metadata). Leave out for files in HU (CT-RATE version 2, most others).
        rescale_intercept: see `rescale_slope`.
        spacing: (d, h, w) in mm, in place of a blank or wrong header (CT-RATE: ZSpacing, XYSpacing twice).

    Returns:
        The scan in float32 Hounsfield units.

    Raises:
        FileNotFoundError: nothing at `path`.
        ValueError: the file can't be read, is not a CT, not three-dimensional, not in HU, or has a geometry
            that can't be right. The message names the file, what was found and the way out.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    name = path.name.lower()
    if path.is_dir():
        kind, read = "DICOM series", _read_dicom
    elif name.endswith(NIFTI):
        kind, read = "NIfTI file", _read_nifti
    elif name.endswith(ITK):
        kind, read = "NRRD or MetaImage file", _read_itk
    elif is_dicom(path):
        raise ValueError(f"{path}: one DICOM file is one slice; give the folder that holds the whole series")
    else:
        known = ", ".join(NIFTI + ITK)
        raise ValueError(f"{path}: not a CT by its name; expected {known} or a folder of DICOM slices")
    rescale = rescale_slope is not None or rescale_intercept is not None
    try:
        hu, affine, notes = read(path, rescale=rescale, spacing=spacing)
        notes = [f"read from {kind} {path.name}", *notes]
        if rescale:
            slope = 1.0 if rescale_slope is None else float(rescale_slope)
            intercept = 0.0 if rescale_intercept is None else float(rescale_intercept)
            if not (np.isfinite(slope) and np.isfinite(intercept) and slope > 0):
                raise ValueError(
                    f"rescale_slope={slope}, rescale_intercept={intercept}: expected finite numbers, slope above 0"
                )
            hu *= slope  # in place: every reader gives an array of its own
            hu += intercept
            notes.append(f"HU = value * {slope:g} + {intercept:g}, as asked for")
        if spacing is not None:
            notes.append(f"spacing {tuple(spacing)} mm, as asked for")
        steps = _steps(affine)
        if not all(_STEP_RANGE[0] <= step <= _STEP_RANGE[1] for step in steps):
            raise ValueError(
                f"spacing {steps} mm (slices, rows, columns) is none of a CT, which has {_STEP_RANGE[0]} to "
                f"{_STEP_RANGE[1]} mm; pass the right one as spacing=(d, h, w)"
            )
        volume = CTVolume(hu, steps, _nearest_orientation(affine), affine, notes)
        check_hu(hu)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return volume if read is _read_nifti else volume.reoriented(CANONICAL)


def check_hu(hu: np.ndarray) -> None:
    """Refuse values that can't be the Hounsfield units of a chest.

    Every chest CT shows air (-1200 to -300 HU, at least 0.5 % of the voxels) and soft tissue (-300 to 300 HU,
    at least 3 %); real scans have tens of percent of both. Stored values that nobody rescaled lack the air,
    values that were rescaled twice lack the soft tissue.

    Args:
        hu: finite values taken for HU, any shape.

    Raises:
        ValueError: constant, implausibly low or high, no air, no soft tissue.
    """
    low, high = float(hu.min()), float(hu.max())
    if low == high:
        raise ValueError(f"every voxel is {low:g}: there is no picture in it")
    # about a million voxels are enough; an odd stride, so that they come from all columns
    sample = hu.reshape(-1)[:: max(1, hu.size // 1_000_000) | 1]
    air = np.mean((sample >= _AIR[0]) & (sample < _AIR[1]))
    soft_tissue = np.mean((sample >= _SOFT_TISSUE[0]) & (sample <= _SOFT_TISSUE[1]))
    found = (
        f"not in HU: values {low:g} to {high:g}, median {np.median(sample):g}, {air:.1%} air "
        f"{_AIR}, {soft_tissue:.1%} soft tissue {_SOFT_TISSUE}."
    )
    if low < _HU_RANGE[0] or high > _HU_RANGE[1]:
        raise ValueError(
            f"{found} HU lie in {_HU_RANGE}; check rescale_slope and rescale_intercept, and leave them out "
            "if the file is in HU already"
        )
    if air < _LEAST_AIR:
        raise ValueError(
            f"{found} A chest has air: these look like stored or normalised values; pass the rescale_slope "
            "and rescale_intercept of this scan (often 1 and -1024)"
        )
    if soft_tissue < _LEAST_SOFT_TISSUE:
        raise ValueError(
            f"{found} A chest has soft tissue: these look like values rescaled twice; leave out "
            "rescale_slope and rescale_intercept if the file is in HU already"
        )


# One reader per format: float32 (d, h, w), affine to RAS mm, notes. `rescale`: the caller brings slope or
# intercept; `spacing`: the caller's, or None.


def _read_nifti(path: Path, rescale: bool, spacing: Sequence[float] | None) -> tuple:
    import nibabel as nib

    image = decode(lambda: nib.load(path))
    if len(image.shape) != 3:
        raise ValueError(
            f"{len(image.shape)}-D, shape {image.shape}: a CT volume has three axes; save the one to read, "
            "for example nibabel.load(path).slicer[..., 0]"
        )
    if image.get_data_dtype().kind not in "iuf":
        raise ValueError(f"voxels of type {image.get_data_dtype()} (colour or complex): not a CT")
    stored = decode(image.dataobj.get_unscaled)
    hu = stored.transpose(2, 1, 0).astype(np.float32, order="C")  # (x, y, z) -> d h w
    if (image.dataobj.slope, image.dataobj.inter) != (1, 0):
        hu *= image.dataobj.slope
        hu += image.dataobj.inter
    header = image.header
    steps = tuple(float(step) for step in header["pixdim"][3:0:-1])
    if header["qform_code"] > 0 or header["sform_code"] > 0:
        affine = image.affine[:, [2, 1, 0, 3]].astype(float)
        if spacing is not None:
            affine = _with_spacing(affine, spacing)
        elif not np.allclose(_steps(affine), steps, rtol=1e-2):
            raise ValueError(
                f"the header contradicts itself: pixdim {steps} mm, affine {_steps(affine)} mm (slices, "
                "rows, columns); pass the right one as spacing=(d, h, w)"
            )
        return hu, affine, ["orientation as stored"]
    if spacing is None and steps == (1, 1, 1):
        raise ValueError("blank header, so the size of a voxel is unknown; pass spacing=(d, h, w) in mm")
    steps = steps if spacing is None else _checked_spacing(spacing)
    note = f"orientation as stored; the header does not say which, {CANONICAL} assumed as in DICOM slices"
    return hu, _straight_affine(steps, CANONICAL), [note]


def _read_itk(path: Path, rescale: bool, spacing: Sequence[float] | None) -> tuple:
    import SimpleITK as sitk

    image = decode(lambda: sitk.ReadImage(str(path)))
    if image.GetDimension() != 3:
        raise ValueError(f"{image.GetDimension()}-D, shape {image.GetSize()}: a CT volume has three axes")
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise ValueError(f"voxels of type {image.GetPixelIDTypeAsString()} (colour or vectors): not a CT")
    axes = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()  # columns x, y, z
    affine = _with_spacing(_ras_affine(axes[:, ::-1], image.GetOrigin()), spacing)
    return sitk.GetArrayViewFromImage(image).astype(np.float32), affine, []  # the array is (z, y, x) already


def _read_dicom(path: Path, rescale: bool, spacing: Sequence[float] | None) -> tuple:
    hu, axes, origin, rescaled, notes = read_series(path)
    if rescale and rescaled:
        raise ValueError("the slices have a slope and intercept of their own; leave out rescale_slope/intercept")
    if rescaled:
        notes.append("slope and intercept of the DICOM headers applied")
    return hu, _with_spacing(_ras_affine(axes, origin), spacing), notes


def _checked_spacing(spacing: Sequence[float]) -> tuple[float, float, float]:
    steps = tuple(float(step) for step in spacing)
    if len(steps) != 3 or not all(np.isfinite(step) and step > 0 for step in steps):
        raise ValueError(f"spacing {steps}: expected three positive lengths in mm (d, h, w)")
    return steps


def _checked_orientation(orientation: str) -> str:
    letters = str(orientation).upper()
    if sorted(_LETTERS.get(letter, (-1,))[0] for letter in letters) != [0, 1, 2]:
        raise ValueError(f"orientation {orientation!r}: expected one each of R/L, A/P and S/I, such as 'SPL'")
    return letters


def _steps(affine: np.ndarray) -> tuple[float, float, float]:
    """Length in mm of one step of d, h and w; rounded, as headers hold float32 (0.75 must stay 0.75)."""
    return tuple(round(float(step), 6) for step in np.linalg.norm(affine[:3, :3], axis=0))


def _straight_affine(spacing: Sequence[float], orientation: str) -> np.ndarray:
    """Affine of a volume that lies straight in the scanner, with its first voxel at the origin."""
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    for column, (step, letter) in enumerate(zip(spacing, orientation, strict=True)):
        axis, sign = _LETTERS[letter]
        affine[axis, column] = sign * step
    return affine


def _ras_affine(axes: np.ndarray, origin: Sequence[float]) -> np.ndarray:
    """Affine from the steps of d, h, w (columns) and the first voxel in the LPS mm of DICOM and ITK."""
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = axes, origin
    affine[:2] *= -1
    return affine


def _with_spacing(affine: np.ndarray, spacing: Sequence[float] | None) -> np.ndarray:
    """The affine with its directions kept and its steps replaced, where `spacing` is given."""
    if spacing is None:
        return affine
    factors = np.divide(_checked_spacing(spacing), np.linalg.norm(affine[:3, :3], axis=0))
    if not np.isfinite(factors).all():
        raise ValueError(f"the affine in the header is unusable: {affine.tolist()}")
    return affine @ np.diag([*factors, 1])


def _nearest_orientation(affine: np.ndarray) -> str:
    """The orientation letters nearest to an affine, which may be oblique."""
    from nibabel.orientations import aff2axcodes

    letters = aff2axcodes(affine)
    if None in letters:
        raise ValueError(f"the affine in the header is unusable: {affine.tolist()}")
    return "".join(letters)
