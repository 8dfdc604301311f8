"""Orientation: a finding on one side of a phantom stays on that side, and a flip does not pass unnoticed."""

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from scan_files import chest, write_dicom, write_itk, write_nifti

from medctkit.phantom.study import generate
from medctkit.scans.formats import READERS
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
    assert effusion[1] > h + 3, "fluid of a patient who lies gathers at the back"
    assert effusion[2] > w + 5, "columns grow towards the left of the patient"


def image(volume: CTVolume, axes="LPS"):
    """A NIfTI image of a volume whose x, y and z grow towards the sides named."""
    whole = nib.Nifti1Image(volume.hu.transpose(2, 1, 0), volume.affine[:, [2, 1, 0, 3]])
    turn = ornt_transform(io_orientation(whole.affine), axcodes2ornt(axes))
    return whole.as_reoriented(turn)


def lie(stored, axis):
    """The same voxels with a header that claims the opposite direction for one axis."""
    affine = stored.affine.copy()
    affine[:, axis] *= -1
    return nib.Nifti1Image(np.asarray(stored.dataobj), affine)


def test_the_check_itself_notices_every_flip(healthy, ill):
    check_the_effusion_is_left_and_low_and_at_the_back(healthy.hu, ill.hu)
    for axis in range(3):
        with pytest.raises(AssertionError):
            check_the_effusion_is_left_and_low_and_at_the_back(np.flip(healthy.hu, axis), np.flip(ill.hu, axis))


@pytest.mark.parametrize("axes", NIFTI_AXES)
def test_nifti_of_any_stored_orientation(tmp_path, healthy, ill, axes):
    read = {}
    for name, volume in {"healthy": healthy, "ill": ill}.items():
        path = tmp_path / f"{name}.nii.gz"
        nib.save(image(volume, axes), path)
        read[name] = read_volume(path, orientation="canonical")
        np.testing.assert_array_equal(read[name].hu, volume.hu)
        np.testing.assert_allclose(read[name].affine, volume.affine, atol=1e-3)
    check_the_effusion_is_left_and_low_and_at_the_back(read["healthy"].hu, read["ill"].hu)


@pytest.mark.parametrize("axes", NIFTI_AXES)
def test_nifti_comes_as_stored_by_default(tmp_path, ill, axes):
    stored = image(ill, axes)
    nib.save(stored, tmp_path / "scan.nii")
    for volume in (read_volume(tmp_path / "scan.nii"), read_volume(tmp_path / "scan.nii", orientation="stored")):
        np.testing.assert_array_equal(volume.hu, np.asarray(stored.dataobj).transpose(2, 1, 0))
        assert volume.orientation == axes[::-1]
        assert volume.provenance[-1] == "orientation as stored"


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["left and right", "front and back", "head and feet"])
def test_a_header_that_lies_is_noticed(tmp_path, healthy, ill, axis):
    read = []
    for volume in (healthy, ill):
        nib.save(lie(image(volume), axis), tmp_path / "scan.nii")
        read.append(read_volume(tmp_path / "scan.nii", orientation="canonical").hu)
    with pytest.raises(AssertionError):
        check_the_effusion_is_left_and_low_and_at_the_back(*read)


@pytest.mark.parametrize("suffix", ["nrrd", "mha"])
@pytest.mark.parametrize("flip", [(), (0,), (2,), (0, 1), (0, 2)])
def test_nrrd_and_metaimage_of_any_direction(tmp_path, healthy, ill, suffix, flip):
    direction = np.diag([-1.0 if 2 - axis in flip else 1.0 for axis in range(3)])
    read = []
    for volume in (healthy, ill):
        stored = np.flip(volume.hu, flip)
        path = write_itk(tmp_path / f"scan.{suffix}", stored, direction.ravel(), volume.spacing)
        read.append(read_volume(path).hu)
        np.testing.assert_array_equal(read[-1], volume.hu)
        np.testing.assert_array_equal(read_volume(path, orientation="stored").hu, stored)
    check_the_effusion_is_left_and_low_and_at_the_back(*read)
    direction[0, 0] *= -1
    lied = write_itk(tmp_path / f"lied.{suffix}", stored, direction.ravel(), volume.spacing)
    with pytest.raises(AssertionError):
        check_the_effusion_is_left_and_low_and_at_the_back(read[0], read_volume(lied).hu)


def read_series(folder, volume, order=1, step=1, **tags):
    """A volume as DICOM slices, from head to feet where `order` is -1, whose headers say so where `step` is -1."""
    thickness, *pixel = volume.spacing
    write_dicom(folder, volume.hu[::order], step=(0, 0, step * thickness), PixelSpacing=pixel, **tags)
    return read_volume(folder)


@pytest.mark.parametrize("order", [1, -1])
def test_dicom_from_feet_to_head_and_from_head_to_feet(tmp_path, healthy, ill, order):
    read = [read_series(tmp_path / str(i), volume, order, order) for i, volume in enumerate((healthy, ill))]
    for volume, expected in zip(read, (healthy, ill), strict=True):
        np.testing.assert_array_equal(volume.hu, expected.hu)
        assert volume.orientation == CANONICAL
    check_the_effusion_is_left_and_low_and_at_the_back(read[0].hu, read[1].hu)


@pytest.mark.parametrize(
    "lie",
    [dict(step=-1), dict(ImageOrientationPatient=[-1, 0, 0, 0, 1, 0])],
    ids=["head and feet", "left and right"],
)
def test_dicom_headers_that_lie_are_noticed(tmp_path, healthy, ill, lie):
    read = [read_series(tmp_path / str(i), volume, **lie).hu for i, volume in enumerate((healthy, ill))]
    with pytest.raises(AssertionError):
        check_the_effusion_is_left_and_low_and_at_the_back(*read)


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIR"])
def test_the_model_sees_the_effusion_where_its_axes_say(tmp_path, healthy, ill, axes):
    config = PreprocessConfig(ill.spacing, ill.shape)
    seen = []
    for volume in (healthy, ill):
        nib.save(image(volume, axes), tmp_path / "scan.nii")
        seen.append(preprocess(read_volume(tmp_path / "scan.nii", orientation="canonical"), config)[0].numpy() * 1000)
    slices = [pixels.transpose(0, 2, 1) for pixels in seen]  # z x y -> d h w
    check_the_effusion_is_left_and_low_and_at_the_back(*slices)
    np.testing.assert_allclose(slices[1], np.clip(ill.hu, -1000, 1000), atol=1e-3)  # not transposed either


# --- the setting


def test_the_default_is_stated_once():
    assert {name: reader.default_orientation for name, reader in READERS.items()}.items() >= {
        "NIfTI file": "stored",
        "NRRD or MetaImage file": "canonical",
        "DICOM series": "canonical",
    }.items()


def test_any_three_letters_may_be_asked_for(tmp_path):
    path = write_nifti(tmp_path / "scan.nii", chest())  # x, y, z to the right, front and head
    volume = read_volume(path, orientation="irp")
    assert volume.orientation == "IRP"
    np.testing.assert_array_equal(volume.hu, chest().transpose(0, 2, 1)[::-1, :, ::-1])
    assert volume.provenance[-1] == "turned from SAR to IRP"
    assert read_volume(path, orientation="SAR").provenance[-1] == "lies SAR already, nothing turned"


def test_the_provenance_of_other_formats(tmp_path):
    path = write_itk(tmp_path / "scan.nrrd", chest())
    assert read_volume(path).provenance[-1] == "lies SPL already, nothing turned"
    folder = write_dicom(tmp_path / "series", chest())
    assert read_volume(folder, orientation="stored").provenance[-1] == "orientation as stored"
    assert read_volume(folder, orientation="SAR").provenance[-1] == "turned from SPL to SAR"


@pytest.mark.parametrize("orientation", ["axial", "SPX", "SP", "", 3])
def test_unknown_orientations_are_refused(tmp_path, orientation):
    path = write_nifti(tmp_path / "scan.nii", chest())
    with pytest.raises(ValueError, match="scan.nii: orientation .*one each of R/L.*or 'stored' or 'canonical'"):
        read_volume(path, orientation=orientation)


def test_identical_scans_of_all_formats_are_identical(tmp_path, ill):
    """Same patient, four formats: the same HU, spacing and place in the patient."""
    nib.save(image(ill, "RAS"), tmp_path / "scan.nii.gz")
    for suffix in ("nrrd", "mha"):
        write_itk(tmp_path / f"scan.{suffix}", ill.hu, spacing=ill.spacing)
    read_series(tmp_path / "series", ill)
    for name in ("scan.nii.gz", "scan.nrrd", "scan.mha", "series"):
        volume = read_volume(tmp_path / name, orientation="canonical")
        np.testing.assert_array_equal(volume.hu, ill.hu, err_msg=name)
        np.testing.assert_allclose(volume.affine, ill.affine, atol=1e-4, err_msg=name)
        assert volume.spacing == pytest.approx(ill.spacing), name
