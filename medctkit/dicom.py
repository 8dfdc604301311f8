"""One DICOM series from a folder: which files, in which order, and the values in them.

File names and SOPInstanceUIDs say nothing about the order of slices (both may be shuffled, repeated or
empty). The position of each slice in the patient does.
"""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

_GEOMETRY = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns")


def is_dicom(path: Path) -> bool:
    """Whether a file starts as a DICOM file does."""
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def decode(read: Callable[[], Any], part: str = "") -> Any:
    """Run a decoder; whatever it raises on a broken file (each has its own types), say what the user can do.

    Raises:
        ValueError: `read` failed; `part` names the file inside a folder.
    """
    try:
        return read()
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        part = f"{part} " if part else ""
        raise ValueError(f"{part}can't be read: truncated or damaged; get the file again ({lines[-1]})") from error


def read_series(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool, list[str]]:
    """Read the one CT series in a folder and its subfolders.

    Returns:
        Values, float32 (d, h, w), each slice with the slope and intercept of its own header; the steps of d, h
        and w as columns (3, 3) and the centre of the first voxel (3,), both in DICOM's patient mm (LPS: towards
        left, back, head); whether the headers gave slope or intercept; notes.

    Raises:
        ValueError: no series or several, not a CT, a damaged slice, or slices that don't form a straight box.
    """
    import SimpleITK as sitk

    slices, notes = _ct_slices(folder)
    slices, step = _by_position(slices)
    first = slices[0][1]
    hu = np.empty((len(slices), first.Rows, first.Columns), dtype=np.float32)
    for i, (path, _) in enumerate(slices):
        # one by one: slope and intercept may change along a series, and SimpleITK applies each file's own
        image = decode(lambda path=path: sitk.ReadImage(str(path)), path.name)
        hu[i] = sitk.GetArrayFromImage(image)[0]
    along_row, along_column = np.reshape(first.ImageOrientationPatient, (2, 3)).astype(float)
    # PixelSpacing is (between rows, between columns); moving to the next row is moving along a column
    axes = np.stack([step, along_column * first.PixelSpacing[0], along_row * first.PixelSpacing[1]], axis=1)
    rescaled = any("RescaleSlope" in header or "RescaleIntercept" in header for _, header in slices)
    return hu, axes, np.array(first.ImagePositionPatient, dtype=float), rescaled, notes


def _ct_slices(folder: Path) -> tuple[list, list[str]]:
    """(path, header) of every slice of the one CT series, and notes on what was left out."""
    import pydicom

    files = sorted(file for file in folder.rglob("*") if file.is_file())
    if not files:
        raise ValueError("the folder is empty; expected the slices of a DICOM series")
    series, localizers = defaultdict(list), 0
    for file in files:
        if not is_dicom(file):
            if file.suffix.lower() == ".dcm":
                raise ValueError(f"{file.name} ({file.stat().st_size} bytes) is damaged: it has no DICOM header")
            continue
        header = decode(lambda file=file: pydicom.dcmread(file, stop_before_pixels=True), file.name)
        if "DirectoryRecordSequence" in header:
            continue  # the index of a CD
        if "LOCALIZER" in header.get("ImageType", ()):
            localizers += 1
        else:
            series[header.get("SeriesInstanceUID", "")].append((file, header))
    if not series:
        raise ValueError(f"no DICOM slice among its {len(files)} files, such as {files[0].name}")
    if len(series) > 1:
        listing = "; ".join(
            f"{len(found)} of {found[0][1].get('Modality', 'unknown')} "
            f"{str(found[0][1].get('SeriesDescription', ''))!r} such as {found[0][0].relative_to(folder)}"
            for found in series.values()
        )
        raise ValueError(f"{len(series)} series in one folder: {listing}. Put the one to read in its own folder")
    (found,) = series.values()
    for file, header in found:
        if header.get("Modality") != "CT":
            raise ValueError(f"{file.name} is of modality {header.get('Modality', 'unknown')}, not a CT")
    return found, [f"{localizers} localizer pictures left out"] if localizers else []


def _by_position(slices: list) -> tuple[list, np.ndarray]:
    """Slices sorted by their position along their normal, and the mean step from one to the next in mm."""
    first_path, first = slices[0]
    for path, header in slices:
        missing = [tag for tag in _GEOMETRY if header.get(tag) in (None, "")]
        if missing:
            raise ValueError(f"{path.name} has no {', '.join(missing)}: damaged, or not a slice of a scan")
        if int(header.get("NumberOfFrames") or 1) > 1:
            raise ValueError(f"{path.name} holds {header.NumberOfFrames} frames; turn it into NIfTI with dcm2niix")
        for tag in _GEOMETRY[1:]:
            if not np.allclose(header[tag].value, first[tag].value, atol=1e-3):
                here, there = header[tag].value, first[tag].value
                raise ValueError(f"{tag} changes along the series: {there} in {first_path.name}, {here} in {path.name}")
    if len(slices) < 2:
        raise ValueError(f"{first_path.name} is the only slice; a volume needs the whole series")
    along_row, along_column = np.reshape(first.ImageOrientationPatient, (2, 3)).astype(float)
    normal = np.cross(along_row, along_column)
    positions = np.array([header.ImagePositionPatient for _, header in slices], dtype=float)
    order = np.argsort(positions @ normal, kind="stable")
    slices, positions = [slices[i] for i in order], positions[order]
    gaps = np.diff(positions @ normal)
    usual = float(np.median(gaps))
    for i in np.flatnonzero(np.abs(gaps - usual) > max(0.1 * usual, 0.01))[:1]:
        raise ValueError(
            f"{slices[i][0].name} and {slices[i + 1][0].name} are {gaps[i]:.2f} mm apart, other slices "
            f"{usual:.2f} mm: slices are missing, doubled, or from two reconstructions"
        )
    if usual <= 0.01:
        raise ValueError(f"all {len(slices)} slices lie in one place, {positions[0].tolist()} mm")
    step = (positions[-1] - positions[0]) / (len(slices) - 1)
    tilt = np.degrees(np.arccos(np.clip(step @ normal / np.linalg.norm(step), -1, 1)))
    if tilt > 1:
        raise ValueError(f"the gantry was tilted by {tilt:.1f} degrees; straighten the scan with dcm2niix first")
    return slices, step
