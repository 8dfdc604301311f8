"""CTVolume and read_volume: every format, every orientation, and what they refuse."""

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from scan_files import LPS, SHAPE, SPACING, chest, orientations, write_itk, write_nifti

from medctkit.scans.volumes import CTVolume, read_volume

# turned by 80 degrees around the head-feet axis
TURNED = [[0, -0.985, -0.174, 0], [0, -0.174, 0.985, 0], [1, 0, 0, 0], [0, 0, 0, 1]]

# --- CTVolume


def test_a_volume_knows_its_geometry():
    volume = CTVolume(chest(), SPACING)
    assert volume.spacing == SPACING and volume.orientation == "SPL" and volume.shape == SHAPE
    # slices to the head, rows to the back (negative anterior), columns to the left (negative right)
    np.testing.assert_array_equal(volume.affine[:3, :3], [[0, 0, -7.7], [0, -8, 0], [12.5, 0, 0]])
    assert repr(volume) == "CTVolume(8 x 12 x 10 voxels of 12.5 x 8 x 7.7 mm, SPL, -900 to 91 HU, int16)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(hu=np.zeros((4, 4))), r"2-D, shape \(4, 4\): a CT volume has three axes"),
        (dict(hu=np.zeros((4, 4, 4, 2))), "4-D"),
        (dict(hu=np.zeros((0, 4, 4))), "three axes"),
        (dict(hu=np.zeros((4, 4, 4), complex)), "type complex128"),
        (dict(hu=np.full((4, 4, 4), np.nan)), "NaN or infinite"),
        (dict(hu=np.full((4, 4, 4), np.inf)), "NaN or infinite"),
        (dict(spacing=(1, 0, 1)), r"spacing \(1, 0, 1\): expected three positive lengths"),
        (dict(spacing=(1, 1)), "three positive lengths"),
        (dict(spacing=(1, 1, float("nan"))), "three positive lengths"),
        (dict(orientation="SPX"), "orientation 'SPX': expected one each of R/L, A/P and S/I"),
        (dict(orientation="SPA"), "orientation 'SPA'"),
        (dict(orientation="SP"), "orientation 'SP'"),
        (dict(affine=np.eye(3)), "expected 4 x 4 finite numbers"),
        (dict(affine=np.diag([1, 1, 9, 1])), r"the affine has steps of \(1.0, 1.0, 9.0\) mm"),
        (dict(affine=np.eye(4)), "orientation 'SPL', but by its affine the volume lies RAS: correct one"),
        (dict(affine=TURNED), "orientation 'SPL', but by its affine the volume lies SLA"),
        (dict(affine=np.diag([-1, -1, 1, 1])[:, [2, 1, 0, 3]] * [1, 1, -1, 1]), "'SPL', but .* lies SPR"),
        (dict(affine=np.ones((4, 4)) / np.sqrt(3)), "unusable, as it does not span a box"),
    ],
)
def test_impossible_volumes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        CTVolume(**{"hu": np.zeros((4, 4, 4)), "spacing": (1, 1, 1), **arguments})


@settings(max_examples=30, deadline=None)
@given(orientations, orientations)
def test_turning_keeps_every_voxel_at_its_place_in_the_patient(first, second):
    volume = CTVolume(chest((2, 3, 4)), SPACING).reoriented(first)
    turned = volume.reoriented(second)
    assert turned.orientation == second
    index = np.array([1, 0, 1])
    place = turned.affine @ [*index, 1]
    d, h, w = np.rint(np.linalg.solve(volume.affine, place)[:3]).astype(int)
    assert volume.hu[d, h, w] == turned.hu[tuple(index)]
    back = turned.reoriented(first)
    np.testing.assert_array_equal(back.hu, volume.hu)
    np.testing.assert_allclose(back.affine, volume.affine, atol=1e-9)
    assert back.spacing == volume.spacing


# --- NIfTI


def test_nifti(tmp_path):
    hu = chest()
    volume = read_volume(write_nifti(tmp_path / "scan.nii.gz", hu))
    np.testing.assert_array_equal(volume.hu, hu)
    assert volume.hu.dtype == np.float32
    assert volume.spacing == SPACING  # float32 in the header, yet 7.7 and not 7.69999981
    assert volume.orientation == "SPL"
    assert volume.provenance == ("read from NIfTI file scan.nii.gz", "lies SPL already, nothing turned")


def test_nifti_scaling_and_the_callers_rescaling(tmp_path):
    stored = chest() + 1024
    path = write_nifti(tmp_path / "v1.nii", stored)
    volume = read_volume(str(path), rescale_intercept=-1024)
    np.testing.assert_array_equal(volume.hu, chest())
    assert "HU = value * 1 + -1024, as asked for" in volume.provenance
    image = nib.Nifti1Image((2 * chest() + 1024).transpose(2, 1, 0), LPS)
    image.header.set_slope_inter(0.5, -512)
    nib.save(image, path)
    expected = nib.load(path).get_fdata().transpose(2, 1, 0)
    volume = read_volume(path)
    np.testing.assert_allclose(volume.hu, expected, atol=1e-3)
    assert "value * 0.5 + -512 of the NIfTI header applied" in volume.provenance


def test_spacing_replaces_the_header(tmp_path):
    volume = read_volume(write_nifti(tmp_path / "scan.nii", chest()), spacing=(10, 6, 9))
    assert volume.spacing == (10, 6, 9)
    np.testing.assert_allclose(np.linalg.norm(volume.affine[:3, :3], axis=0), (10, 6, 9))
    assert "spacing (10, 6, 9) mm, as asked for" in volume.provenance


# --- NRRD and MetaImage


@pytest.mark.parametrize("axes", [3, 4])
@pytest.mark.parametrize("suffix", ["nrrd", "nhdr", "mha", "mhd"])
def test_nrrd_and_metaimage_come_out_canonical(tmp_path, suffix, axes):
    path = write_itk(tmp_path / f"scan.{suffix}", chest())
    if axes == 4:  # (x, y, z, 1)
        sitk.WriteImage(sitk.JoinSeries([sitk.ReadImage(path)]), path)
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.hu, chest())  # ITK's own axes are left, back, head already
    assert volume.orientation == "SPL" and volume.spacing == SPACING and volume.hu.dtype == np.float32
