"""CTVolume and read_volume: every format, every orientation, and what they refuse."""

import gzip
import zipfile

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from scan_files import SHAPE, SPACING, chest, truncate, write_dicom, write_itk, write_nifti

from medctkit.scans.volumes import CTVolume, read_volume

# --- CTVolume


def test_a_volume_knows_its_geometry():
    volume = CTVolume(chest(), SPACING)
    assert volume.spacing == SPACING and volume.orientation == "SPL" and volume.shape == SHAPE
    assert volume.extent_mm == pytest.approx((100, 96, 77))
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
    ],
)
def test_impossible_volumes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        CTVolume(**{"hu": np.zeros((4, 4, 4)), "spacing": (1, 1, 1), **arguments})


orientations = st.permutations(["SI", "PA", "LR"]).flatmap(
    lambda pairs: st.tuples(*map(st.sampled_from, pairs)).map("".join)
)


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


def test_nifti_is_read_as_it_is_stored(tmp_path):
    hu = chest()
    volume = read_volume(write_nifti(tmp_path / "scan.nii.gz", hu))
    np.testing.assert_array_equal(volume.hu, hu)
    assert volume.hu.dtype == np.float32
    assert volume.spacing == SPACING  # float32 in the header, yet 7.7 and not 7.69999981
    assert volume.orientation == "SAR"
    assert volume.provenance == ("read from NIfTI file scan.nii.gz", "orientation as stored")


def test_nifti_scaling_and_the_callers_rescaling(tmp_path):
    stored = chest() + 1024
    path = write_nifti(tmp_path / "v1.nii", stored)
    volume = read_volume(str(path), rescale_intercept=-1024)
    np.testing.assert_array_equal(volume.hu, chest())
    assert "HU = value * 1 + -1024, as asked for" in volume.provenance
    image = nib.Nifti1Image((2 * chest() + 1024).transpose(2, 1, 0), np.diag([*SPACING[::-1], 1]))
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


def test_a_header_without_orientation_gets_the_documented_one(tmp_path):
    path = tmp_path / "blank.nii"
    image = nib.Nifti1Image(chest().transpose(2, 1, 0), None)
    nib.save(image, path)
    with pytest.raises(ValueError, match="blank.nii: blank header.*pass spacing"):
        read_volume(path)
    volume = read_volume(path, spacing=SPACING)
    assert volume.orientation == "SPL" and volume.spacing == SPACING
    assert any("SPL assumed" in note for note in volume.provenance)
    image.header.set_zooms(SPACING[::-1])
    nib.save(image, path)
    assert read_volume(path).spacing == SPACING


def test_a_header_that_contradicts_itself_is_refused(tmp_path):
    path = write_nifti(tmp_path / "odd.nii", chest())
    image = nib.load(path)
    data = bytearray(path.read_bytes())
    assert image.header["magic"] == b"n+1"
    data[80:84] = np.float32(9).tobytes()  # pixdim of x
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"pixdim \(12.5.*9.0\) mm, affine \(12.5, 8.0, 7.7\) mm"):
        read_volume(path)
    assert read_volume(path, spacing=SPACING).spacing == SPACING


@pytest.mark.parametrize("spacing", [(0, 1, 1), (-1, 1, 1), (1, 1), (1, 1, float("nan"))])
def test_impossible_spacings_are_refused(tmp_path, spacing):
    with pytest.raises(ValueError, match="expected three positive lengths"):
        read_volume(write_nifti(tmp_path / "scan.nii", chest()), spacing=spacing)


def test_implausible_spacings_are_refused(tmp_path):
    path = write_nifti(tmp_path / "scan.nii", chest(), np.diag([300, 1, 1, 1]))
    with pytest.raises(ValueError, match=r"spacing \(1.0, 1.0, 300.0\) mm .* pass the right one"):
        read_volume(path)


# --- NRRD and MetaImage


@pytest.mark.parametrize("suffix", ["nrrd", "nhdr", "mha", "mhd"])
def test_nrrd_and_metaimage_come_out_canonical(tmp_path, suffix):
    volume = read_volume(write_itk(tmp_path / f"scan.{suffix}", chest()))
    np.testing.assert_array_equal(volume.hu, chest())  # ITK's own axes are left, back, head already
    assert volume.orientation == "SPL" and volume.spacing == SPACING and volume.hu.dtype == np.float32


def test_flipped_axes_are_turned_back(tmp_path):
    path = write_itk(tmp_path / "scan.nrrd", chest(), direction=(-1, 0, 0, 0, 1, 0, 0, 0, -1))
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.hu, chest()[::-1, :, ::-1])
    assert volume.provenance[-1] == "turned from IPR to SPL"


# --- files that are something else


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.nii.gz: there is no such file or folder"):
        read_volume(tmp_path / "nowhere.nii.gz")


def test_other_kinds_of_file(tmp_path):
    (tmp_path / "scan.png").write_bytes(b"\x89PNG")
    with pytest.raises(
        ValueError, match="scan.png: not a CT by its name; expected .nii, .nii.gz .NIfTI file.* folder, .zip"
    ):
        read_volume(tmp_path / "scan.png")


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz", "scan.nrrd", "scan.mha"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.95])
def test_truncated_files(tmp_path, name, share):
    write = write_nifti if ".nii" in name else write_itk
    path = truncate(write(tmp_path / name, chest((20, 30, 40))), share)
    with pytest.raises(ValueError, match=f"{name}: can't be read: truncated or damaged; get the file again"):
        read_volume(path)


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz", "scan.nrrd", "scan.mha"])
def test_files_of_rubbish(tmp_path, name):
    rubbish = np.random.default_rng(0).bytes(5000)
    (tmp_path / name).write_bytes(gzip.compress(rubbish) if name.endswith("gz") else rubbish)
    with pytest.raises(ValueError, match="can't be read"):
        read_volume(tmp_path / name)


def test_four_dimensions(tmp_path):
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4, 2), np.int16), np.eye(4)), tmp_path / "series.nii")
    with pytest.raises(ValueError, match=r"series.nii: 4-D, shape \(4, 4, 4, 2\): a CT volume has three axes"):
        read_volume(tmp_path / "series.nii")
    sitk.WriteImage(sitk.Image([4, 4, 4, 2], sitk.sitkInt16), str(tmp_path / "series.nrrd"))
    with pytest.raises(ValueError, match="4-D"):
        read_volume(tmp_path / "series.nrrd")


def test_colour_pictures(tmp_path):
    sitk.WriteImage(sitk.Image([4, 4, 4], sitk.sitkVectorUInt8, 3), str(tmp_path / "colour.mha"))
    with pytest.raises(ValueError, match=r"colour or vectors\): not a CT"):
        read_volume(tmp_path / "colour.mha")
    rgb = np.zeros((4, 4, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(rgb, np.eye(4)), tmp_path / "colour.nii")
    with pytest.raises(ValueError, match=r"colour or complex\): not a CT"):
        read_volume(tmp_path / "colour.nii")


# --- values that are not HU


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda hu: hu * 0 + 40, "every voxel is 40: there is no picture"),
        (lambda hu: hu + 1024, "stored or normalised values; pass the rescale_slope"),
        (lambda hu: (hu + 1024) / 4096, "stored or normalised values"),
        (lambda hu: hu - 1024, "rescaled twice; leave out"),
        (lambda hu: hu - 8192, r"HU lie in \(-8192, 32767\); check rescale_slope"),
        (lambda hu: hu * 1e6, r"HU lie in \(-8192, 32767\)"),
        (lambda hu: np.where(hu == hu.max(), np.nan, hu), "NaN or infinite"),
        (lambda hu: np.where(hu == hu.max(), np.inf, hu), "NaN or infinite"),
    ],
    ids=["constant", "stored", "normalised", "rescaled twice", "twice -8192", "huge", "NaN", "infinite"],
)
def test_values_that_are_not_hu(tmp_path, change, message):
    path = write_nifti(tmp_path / "scan.nii", change(chest().astype(np.float32)).astype(np.float32))
    with pytest.raises(ValueError, match=f"scan.nii: .*{message}"):
        read_volume(path)


@pytest.mark.parametrize(("slope", "intercept"), [(0, 0), (-1, 0), (float("nan"), 0), (1, float("inf"))])
def test_impossible_rescaling(tmp_path, slope, intercept):
    with pytest.raises(ValueError, match="rescale_slope=.*expected finite numbers, slope above 0"):
        read_volume(write_nifti(tmp_path / "scan.nii", chest()), slope, intercept)


def test_phantoms_of_both_hospitals_are_in_hu():
    from medctkit.phantom.study import generate
    from medctkit.scans.hounsfield import check_hu

    for hospital in ("source", "target"):
        check_hu(generate(3, hospital).volume.hu)


# --- zip files


def zipped(path, folder):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.dcm")):
            archive.write(file, file.relative_to(folder))
    return path


def test_a_zip_file_is_read_like_its_folder(tmp_path):
    folder = write_dicom(tmp_path / "series", chest())
    volume = read_volume(zipped(tmp_path / "Export.ZIP", folder))
    np.testing.assert_array_equal(volume.hu, read_volume(folder).hu)
    assert volume.provenance[0] == "read from DICOM series Export.ZIP"


def test_one_series_of_a_zip_file_is_chosen(tmp_path):
    write_dicom(tmp_path / "scans" / "a", chest(), series="1.2.3")
    write_dicom(tmp_path / "scans" / "b", chest() - 5, series="1.2.4")
    path = zipped(tmp_path / "scans.zip", tmp_path / "scans")
    np.testing.assert_array_equal(read_volume(path, series="1.2.4").hu, chest() - 5)
    with pytest.raises(ValueError, match="scans.zip: .*series"):
        read_volume(path)


def test_a_damaged_zip_file(tmp_path):
    path = truncate(zipped(tmp_path / "scan.zip", write_dicom(tmp_path / "series", chest())))
    with pytest.raises(ValueError, match="scan.zip: the zip archive is truncated or damaged"):
        read_volume(path)
