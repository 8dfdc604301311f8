"""A CT volume as the DICOM series that a scanner would send: what a gateway is tried out with."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from pydicom.valuerep import format_number_as_ds

from medctkit.scans.volumes import CTVolume

_EMPTY = """PatientName PatientID PatientBirthDate PatientSex StudyDate StudyTime AccessionNumber StudyID
    ReferringPhysicianName SeriesNumber Manufacturer PatientPosition PositionReferenceIndicator AcquisitionNumber KVP
    """.split()


def write_series(volume: CTVolume, folder: str | os.PathLike, tags: Mapping[str, Any] | None = None) -> Path:
    """Write a volume as one CT series, a file for each slice; values are rounded to whole HU.

    Nothing is turned. The `tags` go into every header, by their DICOM keyword, such as {"PatientID": "P1"}; a study and
    a series without a UID get new ones.

    Raises:
        ValueError: values that are not those of a CT: outside of 16 bits; a folder that holds something; an unknown
            tag.
    """
    folder = Path(folder).expanduser()
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty, and slices of two scans would mix; give a folder of its own")
    if unknown := [name for name in tags or {} if tag_for_keyword(name) is None]:
        raise ValueError(f"{unknown[0]!r} is no DICOM keyword; expected names such as PatientID or StudyDate")
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.rint(volume.hu)
    if pixels.min() < -(2**15) or pixels.max() >= 2**15:
        raise ValueError(f"values of {pixels.min():g} to {pixels.max():g} HU: 16 bits hold -32768 to 32767")
    lps = np.diag([-1.0, -1, 1, 1]) @ volume.affine
    directions = lps[:3, :3] / volume.spacing
    common = Dataset()
    for name in _EMPTY:
        setattr(common, name, None)
    for name in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
        setattr(common, name, generate_uid())
    common.SOPClassUID, common.Modality, common.BodyPartExamined = CTImageStorage, "CT", "CHEST"
    common.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    common.ImageOrientationPatient = [f"{x:.9g}" for x in (*directions[:, 2], *directions[:, 1])]
    common.SliceThickness, *common.PixelSpacing = (f"{step:.9g}" for step in volume.spacing)
    common.SamplesPerPixel, common.PhotometricInterpretation = 1, "MONOCHROME2"
    common.Rows, common.Columns = volume.shape[1:]
    common.BitsAllocated, common.BitsStored, common.HighBit, common.PixelRepresentation = 16, 16, 15, 1
    common.RescaleIntercept, common.RescaleSlope, common.RescaleType = "0", "1", "HU"
    for name, value in (tags or {}).items():
        setattr(common, name, value)
    for i, values in enumerate(pixels.astype("<i2")):
        header = Dataset()
        header.update(common)
        header.SOPInstanceUID, header.InstanceNumber = generate_uid(), i + 1
        header.ImagePositionPatient = [format_number_as_ds(float(x)) for x in lps[:3] @ [i, 0, 0, 1]]
        header.PixelData = values.tobytes()
        header.file_meta = FileMetaDataset()
        header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        header.save_as(folder / f"{i:04}.dcm", enforce_file_format=True)
    return folder
