"""Nodules of LIDC-IDRI as masks: DICOM segmentations, one for each nodule and reader, put onto the scan.

A nodule counts where at least `LEAST_READERS` of the four drew it; its mask is what half of those who did agree on, as
is usual with this data. Nodules under 3 mm were not drawn.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medctkit.cohort.manifest import has_file, is_empty, study_from_row, volume_from_row
from medctkit.scans.stored import decode
from medctkit.scans.volumes import CTVolume

if TYPE_CHECKING:
    import pydicom

NODULE = r"Nodule (\d+)"  # in the description of a series
LEAST_READERS = 2


def known_masks(row: Mapping) -> Iterator[tuple[str, np.ndarray, CTVolume]]:
    """Each finding of a row of a manifest whose place is known, its mask, bool (d, h, w), and the scan.

    Of phantoms these are all; of real scans the nodules in the row's folder `masks`, none where it has the label 0.

    Raises:
        ValueError: a real scan without both; or what is in the folder is of another scan.
        FileNotFoundError: nothing is in the folder.
    """
    if not has_file(row):
        study = study_from_row(row)
        yield from ((name, mask, study.volume) for name, mask in study.masks.items())
    elif not is_empty(row.get("masks")):
        volume = volume_from_row(row)
        yield "Lung nodule", nodule_mask(row["masks"], volume), volume
    elif "masks" not in row or row.get("Lung nodule") != 0:
        raise ValueError(
            f"study {row['study']} is a real scan: only phantoms know where their findings are, and rows whose column "
            "masks names a folder of DICOM segmentations (`medctkit download --source idc`)"
        )


def nodule_mask(folder: str | Path, volume: CTVolume) -> np.ndarray:
    """The nodules in a `folder` of segmentations, on the voxels of `volume`: bool (d, h, w).

    Raises:
        FileNotFoundError: no segmentation in the folder.
        ValueError: a file that is no DICOM segmentation, or one that lies outside of the volume.
    """
    import pydicom

    readers = defaultdict(list)
    for file in sorted(Path(folder).expanduser().rglob("*.dcm")):
        drawing = decode(partial(pydicom.dcmread, file), str(file))
        number = re.search(NODULE, str(drawing.get("SeriesDescription")))
        index = decode(partial(_voxels, drawing, volume), f"{file}, as a DICOM segmentation,")
        if len(index) and not ((index >= 0) & (index < volume.shape)).all():
            raise ValueError(f"{file} lies outside of the scan; it is a segmentation of another")
        # two drawn slices may come to one resampled
        filled = np.unique(np.ravel_multi_index(tuple(index.T), volume.shape))
        readers[number[1] if number else str(drawing.get("SeriesInstanceUID"))].append(filled)
    if not readers:
        raise FileNotFoundError(f"{folder}: no DICOM segmentation (*.dcm) in there; fetch it again")
    mask = np.zeros(volume.shape, bool)
    for voxels in readers.values():
        if len(voxels) >= LEAST_READERS:
            where, votes = np.unique(np.concatenate(voxels), return_counts=True)
            mask.flat[where[2 * votes >= len(voxels)]] = True
    return mask


def _voxels(drawing: "pydicom.Dataset", volume: CTVolume) -> np.ndarray:
    """Which voxels (n, 3) of the volume a segmentation fills; it has frames for some of the slices only."""
    shared, frames, found = drawing.SharedFunctionalGroupsSequence[0], drawing.PerFrameFunctionalGroupsSequence, []
    pictures, to_index = drawing.pixel_array.reshape(-1, drawing.Rows, drawing.Columns), np.linalg.inv(volume.affine)
    for picture, frame in zip(pictures, frames, strict=True):
        lies = frame.get("PlaneOrientationSequence") or shared.PlaneOrientationSequence
        steps = (frame.get("PixelMeasuresSequence") or shared.PixelMeasuresSequence)[0].PixelSpacing
        across, down = np.reshape(lies[0].ImageOrientationPatient, (2, 3)).astype(float)
        rows, columns = picture.nonzero()
        lps = np.array(frame.PlanePositionSequence[0].ImagePositionPatient, float)
        lps = lps + np.outer(columns * float(steps[1]), across) + np.outer(rows * float(steps[0]), down)
        found.append((lps * (-1, -1, 1)) @ to_index[:3, :3].T + to_index[:3, 3])
    return np.rint(np.concatenate(found)).astype(int)
