"""Masks of nodules: where half of the readers drew one; a file that is no segmentation is told by its name."""

import numpy as np
import pytest
from scan_files import chest, truncate, write_dicom, write_drawing

from medctkit.cohort.nodules import nodule_mask
from medctkit.scans.volumes import read_volume


def test_a_file_that_is_no_segmentation_is_named(tmp_path):
    volume = read_volume(write_dicom(tmp_path / "scan", chest()))
    write_dicom(tmp_path / "slices", chest()[:1])
    with pytest.raises(ValueError, match=r"000\.dcm, as a DICOM segmentation, can't be read: .*SharedFunctionalGroups"):
        nodule_mask(tmp_path / "slices", volume)
    truncate(tmp_path / "slices" / "000.dcm", 0.1)
    with pytest.raises(ValueError, match=r"000\.dcm can't be read: truncated or damaged"):
        nodule_mask(tmp_path / "slices", volume)


def test_a_nodule_is_where_half_of_its_readers_drew_it(tmp_path):
    tags = dict(
        StudyInstanceUID="1.2.3", FrameOfReferenceUID="1.2.4", PositionReferenceIndicator="", SliceThickness=12.5
    )
    tags |= dict.fromkeys(("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber"), "")
    tags |= dict.fromkeys(("StudyDate", "StudyTime", "StudyID", "ReferringPhysicianName"), "") | {"InstanceNumber": 1}
    scan = write_dicom(tmp_path / "scan", chest(), **tags)
    volume, files = read_volume(scan), sorted(scan.iterdir())
    drawn = np.zeros(volume.shape, bool)
    drawn[2:4, 5:9, 3:6] = True
    alone = np.roll(drawn, 1, axis=2) & ~drawn
    for reader, mask in enumerate((drawn, drawn, drawn | alone)):
        write_drawing(tmp_path / "nodules" / str(reader), files, mask, "Nodule 1")
    write_drawing(tmp_path / "nodules" / "one reader's", files, np.roll(drawn, 3, axis=0), "Nodule 2")
    np.testing.assert_array_equal(nodule_mask(tmp_path / "nodules", volume), drawn)
