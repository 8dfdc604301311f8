"""One DICOM series from a folder: its slices in the right order, which only their positions say, and their values."""

import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medctkit.scans.archives import unpacked
from medctkit.scans.dicom_files import Slice, chosen_series, load
from medctkit.scans.dicom_pixels import PixelReader, check_pixels, loss
from medctkit.scans.geometry import ras_affine
from medctkit.scans.stored import Stored, damaged

PADDING_HU = -1024  # what most scanners write where they did not look
_PLAUSIBLE_HU = (-1024, 3071)  # 12 bits, the range of a CT without the extended scale
_GAP = 0.1  # by which part a gap between two slices may differ from the usual one
_LEAST_GAP = 0.01  # mm; closer slices lie in one place
_MOST_TILT = 1.0  # degrees
# what the slices of one scan have in common: how many numbers, within 0.001, or 0: a text
_IN_COMMON = {"ImageOrientationPatient": 6, "PixelSpacing": 2, "Rows": 1, "Columns": 1, "ConvolutionKernel": 0}
_NOT_HU = {"OD", "MGML", "PCT", "Z_EFF", "ED", "EDW"}  # RescaleType: density, concentration, atomic number ...


def read_dicom(path: Path, spacing: Sequence[float] | None = None, series: str | None = None) -> Stored:
    """Read one CT series in a zip archive, or in a folder and its subfolders.

    Args:
        path: a folder of DICOM files, with or without .dcm in their names, or a zip archive of one.
        spacing: of no use here.
        series: SeriesInstanceUID, SeriesNumber or SeriesDescription of the one to read, where there are several.

    Returns:
        Each slice with the slope and intercept of its own header, slices in the order of their normal.
    """
    if path.is_file():
        with unpacked(path) as folder:
            return read_dicom(folder, spacing, series)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's, of each unusual value; those that matter are checked here
        slices, notes = chosen_series(path, series)
        slices, axes = _by_position(slices)
        hu, rescaled, more = _read_values(slices)
    if rescaled:
        more.append("slope and intercept of the DICOM headers applied")
    return Stored(hu, ras_affine(axes, slices[0].required("ImagePositionPatient", 3)), notes + more, rescaled)


def _by_position(slices: list[Slice]) -> tuple[list[Slice], np.ndarray]:
    """Slices sorted along their normal, and the steps of d, h and w as columns (3, 3), mm."""
    (along_row, along_column), spacing = _common_geometry(slices)
    positions = np.array([item.required("ImagePositionPatient", 3) for item in slices])
    normal = np.cross(along_row, along_column)
    order = np.argsort(positions @ normal, kind="stable")
    slices, positions = [slices[i] for i in order], positions[order]
    step = _straight_step(slices, positions, normal, spacing.min())
    _check_gaps(slices, positions @ normal)
    # PixelSpacing is (between rows, between columns); moving to the next row is moving along a column
    return slices, np.stack([step, along_column * spacing[0], along_row * spacing[1]], axis=1)


def _common_geometry(slices: list[Slice]) -> tuple[np.ndarray, np.ndarray]:
    """Directions of rows and columns (2, 3) and spacing of pixels (2,), which all slices have in common."""
    first = slices[0]
    for item in slices:
        frames = item.numbers("NumberOfFrames")
        if frames is not None and frames[0] > 1:
            raise ValueError(f"{item.name} holds {frames[0]:.0f} frames; turn it into NIfTI with dcm2niix")
        for tag, count in _IN_COMMON.items():
            here, there = ((s.required(tag, count) if count else s.text(tag)) for s in (first, item))
            same = np.allclose(here, there, rtol=0, atol=1e-3) if count else here == there
            if not same:
                found = ", ".join(f"{s.text(tag)} in {s.name}" for s in (first, item))
                way_out = "two scans or reconstructions? Put each into a folder of its own"
                raise ValueError(f"{tag} changes along the series: {found}; {way_out}")
    if len(slices) < 2:
        raise ValueError(f"{first.name} is the only slice; a volume needs the whole series")
    axes, spacing = first.required("ImageOrientationPatient", 6).reshape(2, 3), first.required("PixelSpacing", 2)
    if not np.allclose(axes @ axes.T, np.eye(2), atol=1e-2) or not np.all(spacing > 0):
        found = ", ".join(f"{tag} {first.text(tag)}" for tag in ("ImageOrientationPatient", "PixelSpacing"))
        raise damaged(f"{found}; expected two directions at a right angle, and lengths above 0 mm", first.name)
    return axes, spacing


def _straight_step(slices: list[Slice], positions: np.ndarray, normal: np.ndarray, pixel: float) -> np.ndarray:
    """Step from slice to slice in mm (3,); refuses slices that are doubled, shifted or tilted."""
    along = positions @ normal
    (doubled,) = np.nonzero(np.diff(along) <= _LEAST_GAP)
    if len(doubled):
        names = " and ".join(item.name for item in slices[doubled[0] :][:2])
        raise ValueError(
            f"duplicate slices: {names} both lie at {along[doubled[0]]:.2f} mm, {len(doubled)} of {len(slices)} slices "
            "in a place that is taken (copies, reconstructions, phases?); leave one slice in each place"
        )
    step = (positions[-1] - positions[0]) / (len(slices) - 1)
    sideways = positions - positions[0] - np.outer(along - along[0], step / (step @ normal))
    off = np.linalg.norm(sideways, axis=1)
    line = f"from {slices[0].name} to {slices[-1].name}"
    if off.max() > pixel / 2:
        beside = f"{slices[off.argmax()].name} lies {off.max():.2f} mm beside the line {line}"
        raise ValueError(f"{beside}: two scans in one series; put the slices of each into a folder of its own")
    tilt = np.degrees(np.arccos(np.clip(step @ normal / np.linalg.norm(step), -1, 1)))
    if tilt > _MOST_TILT:
        found = f"the gantry was tilted by {tilt:.1f} degrees ({line}, {along[-1] - along[0]:.2f} mm)"
        raise ValueError(f"{found}; straighten the scan with dcm2niix and read its *_Tilt NIfTI file")
    return step


def _check_gaps(slices: list[Slice], along: np.ndarray) -> None:
    """Refuse slices, `along` mm down their normal, of which some are missing or that are not evenly spaced."""
    gaps = np.diff(along)
    usual = float(np.median(gaps))
    steps = np.round(gaps / usual)

    def gap(i: np.integer) -> str:
        return f"{gaps[i]:.2f} mm from {slices[int(i)].name} to {slices[int(i) + 1].name}"

    if (np.abs(gaps - steps * usual) <= _GAP * usual).all() and (steps >= 1).all() and (steps > 1).any():
        (holes,) = np.nonzero(steps > 1)
        found = f"missing slices: {gap(holes[0])}, other slices {usual:.2f} mm"
        many = f"{steps.sum() - len(gaps):.0f} missing in {len(holes)} place(s)"
        raise ValueError(f"{found}; {many}; get the whole series")
    drift = along - np.linspace(along[0], along[-1], len(along))
    if np.abs(gaps - usual).max() > _GAP * usual or np.abs(drift).max() > usual / 4:
        found = f"uneven gaps between slices: {gap(gaps.argmin())}, {gap(gaps.argmax())}, median {usual:.2f} mm"
        way_out = "get a reconstruction with even steps, or let dcm2niix make one and read its *_Eq NIfTI file"
        raise ValueError(f"{found}; {way_out}")


def _read_values(slices: list[Slice]) -> tuple[np.ndarray, bool, list[str]]:
    """HU float32 (d, h, w), whether headers gave slope or intercept, and notes."""
    rescales = [_rescale(item) for item in slices]
    without = rescales.count(None)
    if 0 < without < len(slices):
        some = f"{without} of {len(slices)} slices have no RescaleSlope and RescaleIntercept"
        raise ValueError(f"{some}, such as {slices[rescales.index(None)].name}; get the series again")
    hu, padded, losses = np.empty(0, np.float32), 0, Counter[str]()
    with PixelReader() as reader:
        for i, (item, rescale) in enumerate(zip(slices, rescales, strict=True)):
            stored = _stored_values(item, reader)
            losses[loss(item)] += 1
            if i == 0:  # only now: the sizes in a damaged header may be anything
                hu = np.empty((len(slices), *stored.shape), np.float32)
            slope, intercept = rescale or (1.0, 0.0)
            hu[i] = stored * slope + intercept  # float64 until here, as GDCM does it
            padded += _fill_padding(hu[i], stored, item)
    notes = [f"{what}, in {n} of {len(slices)} slices" for what, n in losses.items() if what]
    if padded:
        share = f"{padded / hu.size:.2%} of the voxels are padding (PixelPaddingValue)"
        notes.append(f"{share} outside of {_PLAUSIBLE_HU} HU; set to {PADDING_HU} HU")
    if kinds := {item.text("RescaleType") for item in slices} - {"", "HU"}:
        notes.append(f"RescaleType {', '.join(sorted(kinds))} of the headers taken for HU")
    return hu, not without, notes


def _stored_values(item: Slice, reader: PixelReader) -> np.ndarray:
    """Integers of a slice, shape (rows, columns)."""
    whole = load(item.path, item.name)  # again: the pixels of all slices need not be in memory at one time
    if whole is None:
        raise damaged("it changed meanwhile", item.name)
    try:
        check_pixels(whole)
        return reader.read(whole)
    except ValueError as error:
        raise ValueError(f"{item.name} {error}") from error


def _rescale(item: Slice) -> tuple[float, float] | None:
    """Slope and intercept of a slice's header; None where it has neither."""
    kind = item.text("RescaleType").upper()
    if kind in _NOT_HU:
        raise ValueError(f"{item.name} is not in HU: its RescaleType is {kind} (spectral CT?); choose the series in HU")
    if "ModalityLUTSequence" in item.header:
        raise ValueError(f"{item.name} turns stored values into HU by a table; export it with slope and intercept")
    slope, intercept = item.numbers("RescaleSlope"), item.numbers("RescaleIntercept")
    if slope is None and intercept is None:
        return None
    if slope is None or intercept is None or slope[0] <= 0:
        found = " and ".join(f"{tag} {item.text(tag) or None}" for tag in ("RescaleSlope", "RescaleIntercept"))
        raise ValueError(f"{item.name} has {found}, expected both, the slope above 0; get the file again")
    return float(slope[0]), float(intercept[0])


def _fill_padding(hu: np.ndarray, stored: np.ndarray, item: Slice) -> int:
    """Make air of padding (what the scanner did not see) whose value is no plausible HU; returns how many voxels."""
    edges = [item.numbers(tag) for tag in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    if edges[0] is None:
        return 0
    # headers give -2000 of 16 signed bits as 63536 too
    edges = [int(edge[0]) & (2 ** (8 * stored.itemsize) - 1) for edge in edges if edge is not None]
    low, high = sorted(np.array(edges, f"u{stored.itemsize}").view(stored.dtype)[[0, -1]])
    padding = (stored >= low) & (stored <= high) & ((hu < _PLAUSIBLE_HU[0]) | (hu > _PLAUSIBLE_HU[1]))
    hu[padding] = PADDING_HU
    return int(padding.sum())
