"""One DICOM series from a folder: its slices in the right order, which only their positions say, and their values."""

import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from medctkit.scans.archives import unpacked
from medctkit.scans.dicom_files import MARKS, OF_SHOTS, Slice, chosen_series, is_dicom
from medctkit.scans.dicom_pixels import PixelReader, loss
from medctkit.scans.geometry import STEP_RANGE, checked_spacing, ras_affine
from medctkit.scans.limits import check_claim
from medctkit.scans.resampling import evened, straightened
from medctkit.scans.stored import Stored, check_shape, damaged

PADDING_HU = -1024  # what most scanners write where they did not look
_PLAUSIBLE_HU = (-1024, 3071)  # 12 bits, the range of a CT without the extended scale
_GAP = 0.1  # of a step that a gap may differ from the usual one, or a slice lie away from its place
_OFF = 0.21  # of a step that it may where gaps are alike or places rounded: if more, a slice may be missing
_LEAST_GAP = 0.01  # mm; closer slices lie in one place
_MOST_TILT = 1.0  # degrees
_MOST_UNLIKE = 20  # HU by which slices may differ more with their own rescaling than with that of the one before
# what the slices of one scan have in common: how many numbers, within 0.001
_IN_COMMON = {"ImageOrientationPatient": 6, "PixelSpacing": 2, "Rows": 1, "Columns": 1}
_NOT_HU = {"OD", "MGML", "PCT", "Z_EFF", "ED", "EDW"}  # RescaleType: density, concentration, atomic number ...
_PROJECTIONS = {"MIP", "MINIP", "MIN IP", "MAXIMUM", "MINIMUM"}  # in ImageType: of several slices the densest, say
_SPACING = "; pass spacing=(d, h, w) in mm"
_RESAMPLE = "or pass resample=True to interpolate"


def read_dicom(
    path: Path,
    spacing: Sequence[float] | None = None,
    series: str | None = None,
    acquisition: str | None = None,
    resample: bool = False,
) -> Stored:
    """Read one CT series in a zip archive, in a folder and its subfolders, or in an enhanced (multi-frame) file.

    Args:
        path: a folder of DICOM files, with or without .dcm in their names, a zip archive of one, or a file of frames.
        spacing: (d, h, w) in mm; used here where headers have no PixelSpacing.
        series: SeriesInstanceUID, SeriesNumber or SeriesDescription of the one to read, where there are several.
        acquisition: AcquisitionNumber, or what else tells the slices of one series apart (see `dicom_files.MARKS`),
            of those to read; "all": they are one scan.
        resample: where the gantry was tilted, shear the slices straight; where gaps are uneven or slices missing,
            interpolate even ones. Both are refused otherwise.

    Returns:
        Each slice with the slope and intercept of its own header, slices in the order of their normal.
    """
    if path.is_file() and not is_dicom(path):
        with unpacked(path) as folder:
            return read_dicom(folder, spacing, series, acquisition, resample)
    with warnings.catch_warnings(), PixelReader() as reader:
        warnings.simplefilter("ignore")  # pydicom's, of each unusual value; those that matter are checked here
        slices, notes = chosen_series(path, series)
        slices, which = _one_acquisition(slices, acquisition)
        kind = slices[0].text("ImageType").upper()
        if acquisition is None and _PROJECTIONS & set(kind.split("/")):
            found = f"{slices[0].name} is a projection through several slices, no slice (ImageType {kind})"
            raise ValueError(f"{found}; get the series that it was made from, or pass acquisition='all' to read it so")
        axes, pixel = _common_geometry(slices, spacing)
        slices, copies = _in_order(slices, np.cross(*axes), reader)
        if str(acquisition).strip() != "all":
            _check_numbers(slices)
        grid = _grid(slices, axes, pixel, resample)
        hu, rescaled, more = _read_values(slices, reader)
    hu, affine, how = grid.resampled(hu)
    applied = ["slope and intercept of the DICOM headers applied"] if rescaled else []
    return Stored(hu, affine, notes + which + copies + more + applied + how, rescaled)


def _one_acquisition(slices: list[Slice], wanted: str | None) -> tuple[list[Slice], list[str]]:
    """The slices of one acquisition of one patient, and notes; refuses a mixture of several."""
    name, unlike = str(wanted).strip(), _unlike(slices)
    if name == "all":
        return slices, [f"slices unlike in {', '.join(unlike)} taken for one scan, as asked for"] if unlike else []
    chosen = slices
    if wanted is not None:
        chosen = [item for item in slices if name in {item.text(tag) for tag in unlike or MARKS}]
    listing = "".join(f"\n  {tag} {_counted(values)}" for tag, values in unlike.items())
    if not chosen:
        there = listing or " all slices are of one acquisition"
        raise ValueError(f"no slice of acquisition={name!r}; there are:{there}")
    left = _unlike(chosen)
    if left and all(tag in OF_SHOTS and _side_by_side(chosen, tag) for tag in left):
        return chosen, [f"{max(map(len, left.values()))} acquisitions side by side, as of a table that moves"]
    if left:
        ways_out = "acquisition='one of these values', or acquisition='all' if they are one scan"
        raise ValueError(f"slices of several scans in this series; choose by {ways_out}:{listing}")
    return chosen, [f"acquisition {name}: {len(chosen)} of {len(slices)} slices"] if chosen != slices else []


def _unlike(slices: list[Slice]) -> dict[str, dict[str, list[Slice]]]:
    """The marks in which slices differ, and the slices of each value."""
    marks = {}
    for tag in MARKS:
        values = defaultdict[str, list[Slice]](list)
        for item in slices:
            values[item.text(tag)].append(item)
        if len(values) > 1:
            marks[tag] = dict(values)
    return marks


def _counted(values: dict[str, list[Slice]]) -> str:
    """The values of a mark, the most frequent first, as text."""
    most = sorted(values.items(), key=lambda item: -len(item[1]))
    some = [f"{value or 'not given'} ({len(slices)}, such as {slices[0].name})" for value, slices in most[:5]]
    return ", ".join(some) + f" and {len(values) - 5} more" * (len(values) > 5)


def _side_by_side(slices: list[Slice], tag: str) -> bool:
    """Whether acquisitions are the shots of one scan: three or more, none among another's slices, of equal size."""
    row, column = slices[0].required("ImageOrientationPatient", 6).reshape(2, 3)
    along = [float(item.required("ImagePositionPatient", 3) @ np.cross(row, column)) for item in slices]
    numbers = [slices[i].text(tag) for i in np.argsort(along, kind="stable")]
    runs = [len(list(run)) for _, run in groupby(numbers)]
    most = max(runs)
    return 3 <= len(runs) == len(set(numbers)) and all(run == most for run in runs[1:-1])


def _common_geometry(slices: list[Slice], spacing: Sequence[float] | None) -> tuple[np.ndarray, np.ndarray]:
    """Unit directions of rows and columns (2, 3) and spacing of pixels (2,), which all slices have in common."""
    first = slices[0]
    for item in slices:
        frames = item.numbers("NumberOfFrames")
        if frames is not None and frames[0] > 1:
            raise ValueError(f"{item.name} holds {frames[0]:.0f} frames and not where each lies; get the slices")
        for tag, count in _IN_COMMON.items():
            if tag == "PixelSpacing" and spacing is not None and not item.text(tag):
                continue
            here, there = (s.required(tag, count, _SPACING * (tag == "PixelSpacing")) for s in (first, item))
            if not np.allclose(here, there, rtol=0, atol=1e-3):
                found = ", ".join(f"{s.text(tag)} in {s.name}" for s in (first, item))
                way_out = "two scans or reconstructions? Put each into a folder of its own"
                raise ValueError(f"{tag} changes along the series: {found}; {way_out}")
    if len(slices) < 2:
        raise ValueError(f"{first.name} is the only slice; a volume needs the whole series: give its folder")
    axes, pixel = first.required("ImageOrientationPatient", 6).reshape(2, 3), first.numbers("PixelSpacing", 2)
    if spacing is not None and (pixel is None or not np.all(pixel > 0)):
        pixel = np.array(checked_spacing(spacing)[1:])
    if pixel is None or not np.allclose(axes @ axes.T, np.eye(2), atol=1e-2) or not np.all(pixel > 0):
        found = ", ".join(f"{tag} {first.text(tag)}" for tag in ("ImageOrientationPatient", "PixelSpacing"))
        raise damaged(f"{found}; expected two directions at a right angle, and lengths above 0 mm", first.name)
    return axes / np.linalg.norm(axes, axis=1, keepdims=True), pixel  # headers round to a few decimals


def _in_order(slices: list[Slice], normal: np.ndarray, reader: PixelReader) -> tuple[list[Slice], list[str]]:
    """Slices sorted along their normal, without exact copies, and a note; refuses two in one place."""
    places = {id(item): item.required("ImagePositionPatient", 3) for item in slices}
    slices = sorted(slices, key=lambda item: float(places[id(item)] @ normal))
    kept, doubled = slices[:1], list[tuple[Slice, Slice]]()
    for item in slices[1:]:
        apart = places[id(item)] - places[id(kept[-1])]
        if apart @ normal > _LEAST_GAP:
            kept.append(item)
        elif np.abs(apart).max() > _LEAST_GAP or not _same(kept[-1], item, reader):
            doubled.append((kept[-1], item))
    if doubled:
        names = " and ".join(item.name for item in doubled[0])
        raise ValueError(
            f"duplicate slices: {names} both lie at {places[id(doubled[0][0])] @ normal:.2f} mm, {len(doubled)} of "
            f"{len(slices)} slices in a place that is taken (reconstructions, phases?); leave one slice in each place"
        )
    if len(kept) < 2:
        raise ValueError(f"{kept[0].name} and its copies are the only slice; a volume needs the whole series")
    copies = len(slices) - len(kept)
    return kept, [f"left out: exact copy of a slice ({copies})"] if copies else []


def _check_numbers(slices: list[Slice]) -> None:
    """Refuse sorted slices that are two scans, by their numbers alone.

    These come twice, and jump once or all along; or they count on only from each slice to the next but one (or more).
    """
    numbers, found = [item.text("InstanceNumber") for item in slices], ""
    if any(item.frame for item in slices):  # those of a file have one number
        return

    def apart(lag: int) -> Iterator[int]:
        for a, b in zip(numbers, numbers[lag:], strict=False):
            yield abs(int(a) - int(b)) if a.isdecimal() and b.isdecimal() else 0

    jumps, values = sum(step != 1 for step in apart(1)), len(set(numbers))
    if len(numbers) - values > len(numbers) / 4 and values > 1 and (jumps == 1 or jumps >= len(numbers) / 2):
        number = next(number for number, n in Counter(numbers).items() if n > 1)
        names = " and ".join([item.name for item in slices if item.text("InstanceNumber") == number][:2])
        found = f"{names} both have InstanceNumber {number}, as others"
    elif any(all(step == 1 for step in apart(lag)) for lag in range(2, len(numbers) // 4 + 1)):
        found = f"InstanceNumber goes {', '.join(numbers[:5])} ... from {slices[0].name} on"
    if found:
        way_out = "put the slices of each into a folder of its own, or pass acquisition='all' if they are one scan"
        raise ValueError(f"{found}: two scans in one series? {way_out}")


def _same(one: Slice, other: Slice, reader: PixelReader) -> bool:
    return _rescale(one) == _rescale(other) and np.array_equal(reader.read(one), reader.read(other))


class _Grid(NamedTuple):
    """Where slices lie, and where they shall."""

    axes: np.ndarray  # (3, 3): steps of d, h and w as columns, LPS mm
    origin: np.ndarray  # (3,)
    shifts: np.ndarray | None  # (d, 2): rows and columns by which slices are to be moved
    heights: np.ndarray | None  # (d,): places of slices in steps, for even ones to be interpolated
    notes: list[str]

    def resampled(self, hu: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Values (d, h, w) of a straight and even grid, its affine, and notes."""
        origin = self.origin
        if self.shifts is not None:
            hu, first = straightened(hu, self.shifts, PADDING_HU)
            origin = origin + self.axes[:, 1:] @ first
        if self.heights is not None:
            hu = evened(hu, self.heights)
        return hu, ras_affine(self.axes, origin), self.notes


def _grid(slices: list[Slice], directions: np.ndarray, pixel: np.ndarray, resample: bool) -> _Grid:
    """The grid of sorted slices; refuses those that are shifted, tilted, missing or uneven, or says how to resample."""
    along_row, along_column = directions
    normal = np.cross(along_row, along_column)
    positions = np.array([item.required("ImagePositionPatient", 3) for item in slices])
    along = positions @ normal
    step = (positions[-1] - positions[0]) / (len(slices) - 1)
    sideways = positions - positions[0] - np.outer(along - along[0], step / (step @ normal))
    off = np.linalg.norm(sideways, axis=1)
    line = f"from {slices[0].name} to {slices[-1].name}"
    if off.max() > pixel.min() / 2:
        beside = f"{slices[off.argmax()].name} lies {off.max():.2f} mm beside the line {line}"
        raise ValueError(f"{beside}: two scans in one series; put the slices of each into a folder of its own")
    # PixelSpacing is (between rows, between columns); moving to the next row is moving along a column
    in_plane = np.stack([along_column * pixel[0], along_row * pixel[1]], axis=1)
    shifts, heights, notes = None, None, list[str]()
    tilt = np.degrees(np.arccos(np.clip(step @ normal / np.linalg.norm(step), -1, 1)))
    if tilt > _MOST_TILT:
        found = f"the gantry was tilted by {tilt:.1f} degrees ({line}, {along[-1] - along[0]:.2f} mm)"
        if not resample:
            way_out = "pass resample=True to shear it straight, or let dcm2niix do so and read its *_Tilt NIfTI file"
            raise ValueError(f"{found}; {way_out}")
        shifts = (positions - positions[0]) @ np.linalg.pinv(in_plane).T
        step = normal * (step @ normal)
        notes.append(f"{found}; slices sheared straight, as asked for")
    if uneven := _uneven(slices, along):
        if not resample:
            raise ValueError(uneven)
        gaps = np.diff(along)
        usual = float(np.median(gaps))
        if gaps.max() > max(2 * usual, STEP_RANGE[1]):
            raise ValueError(f"{uneven} (not over {gaps.max():.2f} mm)")
        count = round((along[-1] - along[0]) / usual) + 1
        heights = (along - along[0]) / (along[-1] - along[0]) * (count - 1)
        step = step * (len(slices) - 1) / (count - 1)
        check_shape((count, *(int(slices[0].required(tag)[0]) for tag in ("Rows", "Columns"))))
        lengths = f"{len(slices)} slices, {gaps.min():.2f} to {gaps.max():.2f} mm apart"
        notes.append(f"{lengths}, interpolated to {count}, {step @ normal:.2f} mm apart, as asked for")
    return _Grid(np.column_stack([step, in_plane]), positions[0], shifts, heights, notes)


def _uneven(slices: list[Slice], along: np.ndarray) -> str:
    """What is wrong with slices, `along` mm down their normal, that are missing or not evenly spaced; else empty."""
    number, gaps = np.arange(len(along)), np.diff(along)
    slope, start = np.polyfit(number, along, 1)
    usual, off = float(np.median(gaps)), np.abs(along - start - slope * number).max()
    alike = np.abs(gaps - usual).max() <= _GAP * usual
    # rounding an even grid makes gaps of two lengths, one unit of the last decimal apart
    if off <= _OFF * slope and (alike or off <= _GAP * slope or np.ptp(gaps) < 1.1 * _last_decimal(slices)):
        return ""
    steps = np.round(gaps / usual)

    def gap(i: np.integer) -> str:
        return f"{gaps[i]:.2f} mm from {slices[int(i)].name} to {slices[int(i) + 1].name}"

    if (np.abs(gaps - steps * usual) <= _GAP * usual).all() and (steps >= 1).all() and (steps > 1).any():
        (holes,) = np.nonzero(steps > 1)
        many = f"{steps.sum() - len(gaps):.0f} missing in {len(holes)} place(s)"
        found = f"missing slices: {gap(holes[0])}, other slices {usual:.2f} mm; {many}"
        return f"{found}; get the whole series, {_RESAMPLE}"
    found = f"uneven gaps between slices: {gap(gaps.argmin())}, {gap(gaps.argmax())}, median {usual:.2f} mm"
    return f"{found}; get a reconstruction with even steps, {_RESAMPLE}"


def _last_decimal(slices: list[Slice]) -> float:
    """One unit, in mm, of the last decimal to which headers give positions."""
    places = (str(number) for item in slices for number in item.header.ImagePositionPatient)
    return 10.0 ** -max(len(place.partition(".")[2].rstrip("0")) for place in places)


def _read_values(slices: list[Slice], reader: PixelReader) -> tuple[np.ndarray, bool | None, list[str]]:
    """HU float32 (d, h, w), what headers gave (see `Stored.rescaled`), and notes."""
    bits, rows, columns = (int(slices[0].required(tag)[0]) for tag in ("BitsAllocated", "Rows", "Columns"))
    size = sum(path.stat().st_size for path in {item.path for item in slices})
    check_claim((len(slices), rows, columns), -(-bits // 8), size)
    rescales, rescaled = _rescales(slices)
    hu, padded, losses = np.empty(0, np.float32), 0, Counter[str]()
    for i, (item, rescale) in enumerate(zip(slices, rescales, strict=True)):
        stored = reader.read(item)
        losses[loss(item)] += 1
        if i == 0:  # only now: the sizes in a damaged header may be anything
            hu = np.empty((len(slices), *stored.shape), np.float32)
        hu[i] = stored * rescale[0] + rescale[1]  # float64 until here, as GDCM does it
        if i and rescale != rescales[i - 1]:
            slope, intercept = rescales[i - 1]
            own, others = (np.abs(values - hu[i - 1]).mean() for values in (hu[i], stored * slope + intercept))
            if own > 2 * others + _MOST_UNLIKE:
                found = f"{slices[i - 1].name} has slope {slope:g} and intercept {intercept:g}, {item.name} {rescale}"
                raise ValueError(f"{found}, and its values fit those of the other: get the series again")
        padded += _fill_padding(hu[i], stored, item)
    notes = [f"{what}, in {n} of {len(slices)} slices" for what, n in losses.items() if what]
    if len(set(rescales)) > 1:
        notes.append(f"slices have {len(set(rescales))} different slopes and intercepts, each its own")
    if padded:
        share = f"{padded / hu.size:.2%} of the voxels are padding (PixelPaddingValue)"
        notes.append(f"{share} outside of {_PLAUSIBLE_HU} HU; set to {PADDING_HU} HU")
    if kinds := {item.text("RescaleType") for item in slices} - {"", "HU"}:
        notes.append(f"RescaleType {', '.join(sorted(kinds))} of the headers taken for HU")
    return hu, rescaled, notes


def _rescales(slices: list[Slice]) -> tuple[list[tuple[float, float]], bool | None]:
    """Slope and intercept of each slice, and what headers gave: both, neither (False), or only a part (None)."""
    found = [_rescale(item) for item in slices]
    given = {pair.count(None) for pair in found}
    if given == {0}:
        return [(slope, intercept) for slope, intercept in found if slope is not None and intercept is not None], True
    some = [{value for value in values if value is not None} for values in zip(*found, strict=True)]
    if any(len(values) > 1 for values in some):
        lacking = next(item.name for item, pair in zip(slices, found, strict=True) if None in pair)
        raise ValueError(f"{lacking} has no RescaleSlope or RescaleIntercept, and those of others differ; get it again")
    return [(1.0, 0.0)] * len(slices), False if given == {2} else None


def _rescale(item: Slice) -> tuple[float | None, float | None]:
    """Slope and intercept of a slice's header, None where it has none."""
    kind = item.text("RescaleType").upper()
    if kind in _NOT_HU:
        raise ValueError(f"{item.name} is not in HU: its RescaleType is {kind} (spectral CT?); choose the series in HU")
    if "ModalityLUTSequence" in item.header:
        raise ValueError(f"{item.name} turns stored values into HU by a table; export it with slope and intercept")
    slope, intercept = item.numbers("RescaleSlope"), item.numbers("RescaleIntercept")
    if slope is not None and slope[0] <= 0:
        raise ValueError(f"{item.name} has RescaleSlope {slope[0]:g}, expected one above 0; get the file again")
    return (None if slope is None else float(slope[0])), (None if intercept is None else float(intercept[0]))


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
