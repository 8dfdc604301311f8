"""Orientation: a finding on one side of a phantom stays on that side, and a flip does not pass unnoticed."""

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from scan_files import LPS, SPACING, chest, write_dicom, write_itk, write_nifti

from medctkit.phantom.study import generate
from medctkit.scans.preprocessing import PreprocessConfig, preprocess
from medctkit.scans.volumes import CANONICAL, CTVolume, read_volume

NIFTI_AXES = ("RAS", "LPS", "LAS", "RPI", "LAI", "PIR", "SLA")  # towards which x, y and z grow


@pytest.fixture(scope="module")
def healthy():
    return generate(1, findings=[]).volume


@pytest.fixture(scope="module")
def ill():
    """The same patient with a pleural effusion on the left, and nothing else."""
    study = generate(1, findings=["Pleural effusion"])
    assert study.details["Pleural effusion"]["side"] == "left"
    return CTVolume(study.volume.hu, study.volume.spacing)  # its first voxel at the origin, as the files below say


def check_the_effusion_is_left_and_low_and_at_the_back(healthy, ill):
    """Of two arrays in the canonical (d, h, w); an effusion is fluid where the same patient has lung without it."""
    effusion = np.argwhere(ill - healthy > 300).mean(axis=0)
    d, h, w = np.argwhere((healthy > -950) & (healthy < -700)).mean(axis=0)  # lungs
    assert effusion[0] < d - 3, "fluid gathers at the feet end of the lungs, not at their apex"
    assert effusion[1] > h + 1, "fluid of a patient who lies gathers at the back"
    assert effusion[2] > w + 5, "columns grow towards the left of the patient"


def nifti(axes):
    """A writer of NIfTI whose x, y and z grow towards the sides named."""

    def write(folder, volume):
        whole = nib.Nifti1Image(volume.hu.transpose(2, 1, 0), volume.affine[:, [2, 1, 0, 3]])
        stored = whole.as_reoriented(ornt_transform(io_orientation(whole.affine), axcodes2ornt(axes)))
        nib.save(nib.Nifti1Image(np.asarray(stored.dataobj), stored.affine), folder / "scan.nii.gz")
        return folder / "scan.nii.gz"

    return write


def itk(suffix, flip):
    """A writer of NRRD or MetaImage with flipped axes (d, h, w)."""
    x, y, z = (-1.0 if axis in flip else 1.0 for axis in (2, 1, 0))

    def write(folder, volume):
        direction = np.diag([x, y, z]).ravel()
        return write_itk(folder / f"scan.{suffix}", np.flip(volume.hu, flip), direction, volume.spacing)

    return write


def dicom(order=1):
    """A writer of slices, from head to feet where `order` is -1."""

    def write(folder, volume):
        thickness, *pixel = volume.spacing
        steps = (0, 0, order * thickness)
        return write_dicom(folder / "series", volume.hu[::order], step=steps, PixelSpacing=pixel)

    return write


FLIPS = [(), (0,), (2,), (0, 1), (0, 2)]
STORED = {f"NIfTI {axes}": nifti(axes) for axes in NIFTI_AXES}
STORED |= {f"{suffix} flipped {flip}": itk(suffix, flip) for suffix in ("nrrd", "mha") for flip in FLIPS}
STORED |= {"DICOM from the feet": dicom(), "DICOM from the head": dicom(-1)}


def written_and_read(folder, write, *volumes):
    for i, volume in enumerate(volumes):
        (folder / str(i)).mkdir()
        yield read_volume(write(folder / str(i), volume), orientation="canonical")


def test_the_check_itself_notices_every_flip(healthy, ill):
    check_the_effusion_is_left_and_low_and_at_the_back(healthy.hu, ill.hu)
    for axis in range(3):
        with pytest.raises(AssertionError):
            check_the_effusion_is_left_and_low_and_at_the_back(np.flip(healthy.hu, axis), np.flip(ill.hu, axis))


@pytest.mark.parametrize("write", STORED.values(), ids=STORED)
def test_a_scan_is_the_same_however_it_was_stored(tmp_path, healthy, ill, write):
    read = list(written_and_read(tmp_path, write, healthy, ill))
    for volume, expected in zip(read, (healthy, ill), strict=True):
        np.testing.assert_array_equal(volume.hu, expected.hu)
        assert volume.orientation == CANONICAL and volume.spacing == pytest.approx(expected.spacing)
    check_the_effusion_is_left_and_low_and_at_the_back(read[0].hu, read[1].hu)


@pytest.mark.parametrize("name", [name for name in STORED if name.startswith("NIfTI") or name.endswith(("()", "feet"))])
def test_a_scan_keeps_its_place_in_the_patient(tmp_path, ill, name):
    (volume,) = written_and_read(tmp_path, STORED[name], ill)
    np.testing.assert_allclose(volume.affine, ill.affine, atol=1e-3)


@pytest.mark.parametrize("write", STORED.values(), ids=STORED)
def test_a_patient_reaches_the_model_in_one_way_whatever_the_format(tmp_path, ill, write):
    """As DICOM, as the NIfTI that dcm2niix makes of it (LAS), read by default or as stored."""
    config = PreprocessConfig.for_shape((24, 40, 40))
    expected, path = preprocess(ill, config), write(tmp_path, ill)
    for orientation in ("canonical", "stored", "IAR"):
        assert torch.equal(preprocess(read_volume(path, orientation=orientation), config), expected)


@pytest.mark.parametrize("axes", NIFTI_AXES)
def test_nifti_comes_as_stored_when_asked(tmp_path, ill, axes):
    path = nifti(axes)(tmp_path, ill)
    volume = read_volume(path, orientation="stored")
    np.testing.assert_array_equal(volume.hu, np.asarray(nib.load(path).dataobj).transpose(2, 1, 0))
    assert volume.orientation == axes[::-1] and volume.provenance[-1] == "orientation as stored"


@pytest.mark.parametrize("sform", [np.eye(4), np.full((4, 4), np.nan), np.diag([7.7, 8, 12.5, 1])])
def test_a_header_that_does_not_know_how_the_scan_lies_is_overruled(tmp_path, sform):
    path = write_nifti(tmp_path / "v1.nii", chest())
    data = bytearray(path.read_bytes())
    header = np.frombuffer(data, nib.nifti1.header_dtype, count=1)
    header["srow_x"], header["srow_y"], header["srow_z"] = sform[:3]
    path.write_bytes(data)
    volume = read_volume(path, spacing=SPACING, stored_as="SPL")
    np.testing.assert_array_equal(volume.hu, chest())
    assert (
        volume.orientation == "SPL"
        and volume.spacing == SPACING
        and "taken to lie SPL, as asked for" in volume.provenance
    )
    np.testing.assert_array_equal(read_volume(path, spacing=SPACING, stored_as="sar").hu, chest()[:, ::-1, ::-1])
    with pytest.raises(ValueError, match="v1.nii: orientation 'SPX'"):
        read_volume(path, stored_as="SPX")


@pytest.mark.parametrize("flip", FLIPS)
def test_nrrd_comes_as_stored_when_asked(tmp_path, ill, flip):
    volume = read_volume(itk("nrrd", flip)(tmp_path, ill), orientation="stored")
    np.testing.assert_array_equal(volume.hu, np.flip(ill.hu, flip))


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIR"])
def test_the_model_sees_the_effusion_where_its_axes_say(tmp_path, healthy, ill, axes):
    config = PreprocessConfig(ill.spacing, ill.shape)
    seen = [preprocess(volume, config)[0] * 1000 for volume in written_and_read(tmp_path, nifti(axes), healthy, ill)]
    slices = [pixels.numpy().transpose(0, 2, 1) for pixels in seen]  # z x y -> d h w
    check_the_effusion_is_left_and_low_and_at_the_back(*slices)
    np.testing.assert_allclose(slices[1], np.clip(ill.hu, -1000, 1000), atol=1e-3)  # not transposed either


# --- the setting


def test_any_three_letters_may_be_asked_for(tmp_path):
    path = write_nifti(tmp_path / "scan.nii", chest(), np.abs(LPS))  # x, y, z to the right, front and head
    volume = read_volume(path, orientation="irp")
    assert volume.orientation == "IRP"
    np.testing.assert_array_equal(volume.hu, chest().transpose(0, 2, 1)[::-1, :, ::-1])
    assert volume.provenance[-1] == "turned from SAR to IRP"
    assert read_volume(path, orientation="SAR").provenance[-1] == "lies SAR already, nothing turned"


@pytest.mark.parametrize("orientation", ["axial", "SPX", "SP", "", 3])
def test_unknown_orientations_are_refused(tmp_path, orientation):
    path = write_nifti(tmp_path / "scan.nii", chest())
    with pytest.raises(ValueError, match="scan.nii: orientation .*one each of R/L.*or 'stored' or 'canonical'"):
        read_volume(path, orientation=orientation)
