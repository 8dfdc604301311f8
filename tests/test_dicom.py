"""DICOM series: which files, in which order, with which values, and what is refused."""

import numpy as np
import pydicom
import pytest
from scans import SHAPE, SPACING, chest, truncate, write_dicom

from medctkit.volumes import read_volume


def test_slices_are_sorted_by_position_not_by_name(tmp_path):
    hu = chest()
    names = [f"{n:03}.dcm" for n in np.random.default_rng(0).permutation(len(hu))]
    volume = read_volume(write_dicom(tmp_path / "series", hu, names))
    np.testing.assert_array_equal(volume.hu, hu)
    assert volume.orientation == "SPL" and volume.spacing == SPACING and volume.hu.dtype == np.float32
    assert "slope and intercept of the DICOM headers applied" in volume.provenance


def test_slices_from_head_to_foot_come_out_canonical(tmp_path):
    volume = read_volume(write_dicom(tmp_path, chest(), step=(0, 0, -SPACING[0])))
    np.testing.assert_array_equal(volume.hu, chest()[::-1])


def test_uids_and_fractions_of_slopes(tmp_path):
    folder = write_dicom(tmp_path, chest(), slope=0.5, intercept=-1000, SOPInstanceUID="")
    np.testing.assert_array_equal(read_volume(folder).hu, chest())


def test_coronal_slices_are_turned(tmp_path):
    # rows go down from the head, slices from front to back
    folder = write_dicom(tmp_path, chest(), step=(0, SPACING[0], 0), ImageOrientationPatient=[1, 0, 0, 0, 0, -1])
    volume = read_volume(folder)
    np.testing.assert_array_equal(volume.hu, chest().transpose(1, 0, 2)[::-1])
    assert volume.spacing == (SPACING[1], SPACING[0], SPACING[2])


def test_localizers_and_other_files_are_left_out(tmp_path):
    write_dicom(tmp_path, chest())
    write_dicom(tmp_path / "scout", chest()[:1], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    (tmp_path / "readme.txt").write_text("notes")
    volume = read_volume(tmp_path)
    assert volume.shape == SHAPE and "1 localizer pictures left out" in volume.provenance


def test_several_series_are_listed(tmp_path):
    write_dicom(tmp_path / "a", chest())
    write_dicom(tmp_path / "b", chest()[:3], SeriesDescription="sharp kernel")
    with pytest.raises(ValueError, match="2 series in one folder: 8 of CT 'chest' .*; 3 of CT 'sharp kernel'"):
        read_volume(tmp_path)


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        (dict(Modality="MR"), "000.dcm is of modality MR, not a CT"),
        (dict(Modality=None), "modality unknown, not a CT"),
        (dict(ImagePositionPatient=None), "000.dcm has no ImagePositionPatient"),
        (dict(PixelSpacing=None), "has no PixelSpacing"),
        (dict(NumberOfFrames=5), "holds 5 frames"),
        (dict(ImagePositionPatient=[0, 0, 0]), "8 slices lie in one place"),
        (dict(step=(0, 1.0, 2.5)), "gantry was tilted by 21.8 degrees"),
    ],
)
def test_series_that_are_no_ct_volume_are_refused(tmp_path, tags, message):
    with pytest.raises(ValueError, match=message):
        read_volume(write_dicom(tmp_path, chest(), **tags))


def test_a_missing_slice_is_noticed(tmp_path):
    write_dicom(tmp_path, chest())
    (tmp_path / "004.dcm").unlink()
    with pytest.raises(ValueError, match="003.dcm and 005.dcm are 25.00 mm apart, other slices 12.50 mm"):
        read_volume(tmp_path)


def test_a_doubled_slice_is_noticed(tmp_path):
    write_dicom(tmp_path, chest())
    (tmp_path / "copy.dcm").write_bytes((tmp_path / "004.dcm").read_bytes())
    with pytest.raises(ValueError, match="004.dcm and copy.dcm are 0.00 mm apart"):
        read_volume(tmp_path)


def test_slices_of_two_sizes_are_refused(tmp_path):
    write_dicom(tmp_path, chest(), series="1.2.3")
    write_dicom(tmp_path, chest()[:1, :, :5], names=["small.dcm"], series="1.2.3")
    with pytest.raises(ValueError, match="Columns changes along the series: 10 in 000.dcm, 5 in small.dcm"):
        read_volume(tmp_path)


def test_a_single_slice_is_refused(tmp_path):
    write_dicom(tmp_path, chest()[:1])
    with pytest.raises(ValueError, match="000.dcm is the only slice"):
        read_volume(tmp_path)
    with pytest.raises(ValueError, match="one DICOM file is one slice; give the folder"):
        read_volume(tmp_path / "000.dcm")


def test_dicom_is_not_rescaled_twice(tmp_path):
    with pytest.raises(ValueError, match="slices have a slope and intercept of their own"):
        read_volume(write_dicom(tmp_path, chest()), rescale_intercept=-1024)


def test_dicom_without_slope_can_be_given_one(tmp_path):
    folder = write_dicom(tmp_path, chest(), RescaleSlope=None, RescaleIntercept=None)
    with pytest.raises(ValueError, match="not in HU: .* pass the rescale_slope"):
        read_volume(folder)
    np.testing.assert_array_equal(read_volume(folder, 1, -1024).hu, chest())


@pytest.mark.parametrize("share", [0.0, 0.15, 0.6, 0.95])
def test_a_truncated_slice_is_named(tmp_path, share):
    write_dicom(tmp_path, chest((8, 40, 40)))
    truncate(tmp_path / "003.dcm", share)
    with pytest.raises(ValueError, match="003.dcm.*damaged"):
        read_volume(tmp_path)


def test_empty_folders_and_folders_without_dicom(tmp_path):
    with pytest.raises(ValueError, match="folder is empty; expected the slices of a DICOM series"):
        read_volume(tmp_path)
    (tmp_path / "scan.txt").write_text("no scan")
    with pytest.raises(ValueError, match="no DICOM slice among its 1 files, such as scan.txt"):
        read_volume(tmp_path)


def test_the_dicom_writer_here_writes_dicom(tmp_path):
    write_dicom(tmp_path, chest())
    assert pydicom.dcmread(tmp_path / "000.dcm").pixel_array.shape == SHAPE[1:]
