"""Scans that are unusual but right, or that the caller knows better than their headers: read voxel for voxel."""

import gzip
import os
import sys

import nibabel as nib
import numpy as np
import pytest
from headers import itk, mha, nifti, nrrd, pixdim, saved
from scan_files import LPS, SPACING, chest, to_nifti, write_dicom, write_itk, write_nifti

from medctkit.phantom.study import generate
from medctkit.scans import stored
from medctkit.scans.preprocessing import PreprocessConfig, preprocess
from medctkit.scans.volumes import CTVolume, read_volume

NAN = float("nan")


@pytest.mark.parametrize("extra", [(1,), (1, 1), (1, 1, 1)])
def test_axes_of_one_after_the_third_are_left_out(tmp_path, extra):
    volume = read_volume(saved(chest().transpose(2, 1, 0).reshape(10, 12, 8, *extra))(tmp_path))
    np.testing.assert_array_equal(volume.hu, chest())
    assert f"{3 + len(extra)}-D with nothing along the axes after the third" in volume.provenance


@pytest.mark.parametrize("kind", ["<i2", ">i2", "<i4", ">i4", "<f4", ">f4", "<f8", ">f8", "<i8"])
@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
def test_types_and_byte_orders(tmp_path, kind, name):
    header = nib.Nifti1Header(endianness=kind[0])
    header.set_data_dtype(kind)
    nib.save(nib.Nifti1Image(chest().transpose(2, 1, 0).astype(kind), LPS, header), tmp_path / name)
    volume = read_volume(tmp_path / name)
    np.testing.assert_array_equal(volume.hu, chest())
    assert volume.hu.dtype == np.float32 and volume.hu.flags.c_contiguous and type(volume.hu) is np.ndarray


def test_unsigned_voxels_and_nifti_2(tmp_path):
    stored = (chest() + 1024).astype(np.uint16).transpose(2, 1, 0)
    nib.save(nib.Nifti2Image(stored, LPS), tmp_path / "scan.nii.gz")
    np.testing.assert_array_equal(read_volume(tmp_path / "scan.nii.gz", rescale_intercept=-1024).hu, chest())


@pytest.mark.parametrize("slope", [0, NAN])
def test_a_scale_of_0_or_nan_means_not_scaled(tmp_path, slope):
    np.testing.assert_array_equal(read_volume(nifti(scl_slope=slope, scl_inter=7)(tmp_path)).hu, chest())


@pytest.mark.parametrize(("code", "name", "mm"), [(1, "metres", 1000), (3, "micrometres", 0.001)])
def test_lengths_in_other_units_become_mm(tmp_path, code, name, mm):
    image = nib.Nifti1Image(chest().transpose(2, 1, 0), np.diag([*(step / mm for step in SPACING[::-1]), 1]))
    image.header["xyzt_units"] = code
    nib.save(image, tmp_path / "scan.nii")
    volume = read_volume(tmp_path / "scan.nii")
    assert volume.spacing == pytest.approx(SPACING)
    assert f"lengths in the header are {name}, turned into mm" in volume.provenance
    assert read_volume(tmp_path / "scan.nii", spacing=(10, 6, 9)).spacing == (10, 6, 9)


def test_spacing_mends_a_header_without_sizes(tmp_path):
    for i, write in enumerate(
        [
            nifti(pixdim=pixdim(0, 0, 0)),
            nifti(pixdim=pixdim(1, 8, 12.5)),  # against the affine
            nifti(pixdim=pixdim(1, 1, 1), sform_code=0, qform_code=0),
            nifti(pixdim=pixdim(NAN, -1, 0), sform_code=0, qform_code=1),
            mha("ElementSpacing", "Comment"),
            mha(" 12.5", " 12,5"),
            nrrd("kinds:", 'space units: "um" "um" "um"\nkinds:'),
            nrrd("space directions: (7.7000000000000002,0,0) (0,8,0) (0,0,12.5)\n", ""),
            nifti(xyzt_units=5),  # unknown
            nifti(xyzt_units=1),  # metres
        ]
    ):
        (tmp_path / str(i)).mkdir()
        volume = read_volume(write(tmp_path / str(i)), spacing=SPACING)
        np.testing.assert_array_equal(volume.hu, chest())
        assert volume.spacing == SPACING


@pytest.mark.parametrize(
    "write",
    [
        mha("TransformMatrix = 1 0 0 0 1 0 0 0 1\n", ""),
        nifti(sform_code=0, qform_code=0),
        nrrd("left-posterior-superior", "scanner-xyz"),
    ],
    ids=["MetaImage", "NIfTI", "NRRD"],
)
def test_a_header_that_says_no_orientation_gets_the_documented_one(tmp_path, write):
    volume = read_volume(write(tmp_path))
    assert volume.orientation == "SPL" and volume.spacing == SPACING
    assert "the header does not say how the scan lies, SPL assumed as in DICOM slices" in volume.provenance


@pytest.mark.parametrize("name", ["Thoráx 肺.nii.gz", "Thoráx 肺.nii", "Thoráx 肺.nrrd", "Thoráx 肺.mhd"])
def test_names_in_any_script(tmp_path, name):
    folder = tmp_path / "Müller, Ö. – день"
    folder.mkdir()
    path = (write_nifti if ".nii" in name else write_itk)(folder / name, chest())
    np.testing.assert_array_equal(read_volume(path).hu, chest())


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_that_are_not_utf_8(tmp_path):
    folder = tmp_path / os.fsdecode(b"M\xfcller")
    for path in (write_dicom(folder, chest()), write_nifti(folder / "scan.nii.gz", chest())):
        np.testing.assert_array_equal(read_volume(path).hu, chest())
    for name in ("scan.nrrd", "scan.mha"):
        with pytest.raises(ValueError, match=f"{name}: its path is not UTF-8, .*; rename it, or copy"):
            read_volume(write_itk(tmp_path / name, chest()).rename(folder / name))


# --- what was not scanned


def circle(hu, radius, value):
    """Float HU with `value` outside of a reconstruction circle of that part of half the width."""
    rows, columns = (np.linspace(-1, 1, n) for n in hu.shape[1:])
    return np.where(rows[:, None] ** 2 + columns**2 > radius**2, value, hu).astype(np.float32)


@pytest.fixture(scope="module")
def phantom():
    return generate(2, findings=[], shape=(30, 60, 60)).volume


@pytest.mark.parametrize("value", [-9999, -32768, -1e30, NAN])
@pytest.mark.parametrize("radius", [0.6, 1.0])
def test_what_was_not_scanned_is_air(tmp_path, phantom, value, radius):
    marked = circle(phantom.hu, radius, value)
    volume = read_volume(to_nifti(tmp_path / "scan.nii.gz", phantom, marked))
    np.testing.assert_array_equal(volume.hu, circle(phantom.hu, radius, -1024))
    assert any(f"not scanned and marked {value:g}, taken for -1024 HU" in note for note in volume.provenance)
    turned = CTVolume(volume.hu, phantom.spacing).reoriented("PIR")  # slices are coronal
    outside = CTVolume(circle(0 * phantom.hu, radius, 1), phantom.spacing).reoriented("PIR").hu == 1
    again = np.where(outside, value, turned.hu).astype(np.float32)
    np.testing.assert_array_equal(read_volume(to_nifti(tmp_path / "again.nii", turned, again)).hu, volume.hu)


def test_the_mark_may_come_out_of_the_rescaling(tmp_path, phantom):
    stored_values = (circle(phantom.hu, 1, -32768 + 1024) - 1024 * -1).astype(np.int32)
    path = to_nifti(tmp_path / "scan.nii", phantom, stored_values)
    assert read_volume(path, rescale_intercept=-1024).hu.min() == -1024


def holes(hu):
    """A hole in the patient, slices that are missing, some voxels at an edge, two marks, nearly all of the scan."""
    spots = [np.s_[10:12, 30:33, 20:40], np.s_[12:14], np.s_[-1, -1, -5:], np.s_[:, :, 5:]]
    for value in (-9999, NAN):
        for spot in spots:
            broken = hu.astype(np.float32)
            broken[spot] = value
            yield broken
    two = circle(hu, 1, -9999)
    two[0, 0, 0] = -9998
    yield two


def test_holes_are_refused(tmp_path, phantom):
    for broken in holes(phantom.hu):
        with pytest.raises(ValueError, match="NaN or infinite|HU lie in"):
            read_volume(to_nifti(tmp_path / "scan.nii", phantom, broken))


# --- headers


def with_more(write, more):
    def longer(folder):
        path = write(folder)
        with open(path, "ab") as file:
            file.write(more)
        return path

    return longer


def packed_with_more(folder):
    path = nifti()(folder)
    (folder / "scan.nii.gz").write_bytes(gzip.compress(path.read_bytes() + b"\0" * 100))
    return folder / "scan.nii.gz"


def in_members(folder):
    """As bgzip and pigz -i write: several gzip streams, one after the other."""
    data = nifti()(folder).read_bytes()
    (folder / "scan.nii.gz").write_bytes(gzip.compress(data[:700]) + gzip.compress(data[700:]))
    return folder / "scan.nii.gz"


READ_ALL_THE_SAME = {
    "bytes after the voxels": with_more(nifti(), b"more"),
    "bytes after the voxels, packed": packed_with_more,
    "bytes after the gzip stream": with_more(nifti("scan.nii.gz"), b"more"),
    "several gzip streams": in_members,
    "bytes after the voxels, MetaImage": with_more(mha(), b"more"),
    "bytes after the voxels, NRRD": with_more(nrrd(), b"more"),
    "bytes after the voxels, packed NRRD": with_more(itk("scan.nrrd", compressed=True), b"more"),
    "packed voxels in a file of their own": itk("scan.mhd", "CompressedDataSize", "Comment", compressed=True),
    "a qform nobody needs": nifti(qform_code=1, quatern_b=1, quatern_c=1),
    "a qform of NaN": nifti(qform_code=1, quatern_b=NAN),
    "an sform nobody needs": nifti(srow_x=[0, 0, 0, 0], qform_code=1),
    "qfac 0": nifti(sform_code=0, qform_code=1, pixdim=[0, 7.7, 8, 12.5, 0, 0, 0, 0]),
}


@pytest.mark.parametrize("write", READ_ALL_THE_SAME.values(), ids=READ_ALL_THE_SAME)
def test_headers_with_something_that_nobody_needs(tmp_path, write):
    volume = read_volume(write(tmp_path))
    np.testing.assert_array_equal(volume.hu, chest())
    assert (volume.spacing, volume.orientation) == (pytest.approx(SPACING), "SPL")


# --- long and sparse scans


def long_scan(volume, slices=260):
    """The phantom with belly and legs below it and a head above, on a hollow table, 4 mm from slice to slice."""
    rows, columns = (np.linspace(-1, 1, n) for n in volume.shape[1:])
    soft = (rows[:, None] / 0.55) ** 2 + (columns / 0.75) ** 2 < 1
    bowel = (rows[:, None] ** 2 + columns**2) < 0.02
    whole = np.full((slices, *volume.shape[1:]), -1000, np.int16)
    whole[:, soft] = 40
    whole[40:60, bowel] = -900
    whole[120 : 120 + len(volume.hu)] = volume.hu
    middle = volume.shape[2] // 2
    whole[160:, middle - 2 : middle + 2, middle - 2 : middle + 2] = -1000  # the windpipe goes on into the head
    whole[160:164, middle - 2 : middle + 2, 20:-20] = -1000
    whole[:, -4:-1, 10:-10] = -60  # the shell of a table, and foam in it
    whole[:, -3:-2, 11:-11] = -950
    return whole


@pytest.mark.parametrize("axes", ["SPL", "PIR"])
def test_the_chest_is_cut_out_of_a_long_scan(tmp_path, axes):
    chest_only = generate(2, findings=[], shape=(75, 96, 96)).volume
    whole = CTVolume(long_scan(chest_only), (4.0, *chest_only.spacing[1:])).reoriented(axes)
    path = to_nifti(tmp_path / "long.nii.gz", whole)
    with pytest.raises(ValueError, match=r"cover .*1040.* mm, a chest 40 to 700 mm .*crop=\"chest\" to cut the chest"):
        read_volume(path)
    volume = read_volume(path, crop="chest")
    first, last = map(
        int, volume.provenance[1].split(" of ")[0].removeprefix("the chest cut out: slices ").split(" to ")
    )
    first, last = (first, last) if axes == "SPL" else (259 - last, 259 - first)
    lungs = 120 + np.flatnonzero((chest_only.hu < -600)[:, 44:52, 28:36].mean((1, 2)) > 0.5)
    assert lungs[0] - 25 <= first <= lungs[0] - 5 and lungs[-1] + 5 <= last <= lungs[-1] + 25  # of 4 mm
    np.testing.assert_array_equal(volume.hu, whole.reoriented().hu[first : last + 1])
    np.testing.assert_allclose(volume.affine @ [0, 1, 2, 1], whole.reoriented().affine @ [first, 1, 2, 1], atol=1e-3)


def test_a_long_scan_without_lungs_is_refused(tmp_path, phantom):
    solid = np.where(phantom.hu > -1000, 40, -1000).astype(np.int16)
    path = to_nifti(tmp_path / "belly.nii", phantom, solid)
    with pytest.raises(ValueError, match="litres of gas inside of the body, lungs have .*cut it out by hand"):
        read_volume(path, crop="chest")
    with pytest.raises(ValueError, match="crop='belly': expected 'chest'"):
        read_volume(path, crop="belly")


def test_sparse_hrct_is_read_when_asked_for(tmp_path):
    folder = write_dicom(tmp_path / "hrct", chest(), step=(0, 0, 30.0), SliceThickness=1)
    path = write_nifti(tmp_path / "hrct.nii", chest(), LPS @ np.diag([1, 1, 30 / 12.5, 1]))
    for scan in (folder, path):
        with pytest.raises(ValueError, match="spacing .30.0.*largest_gap=30 if it is a sparse HRCT"):
            read_volume(scan)
        volume = read_volume(scan, largest_gap=30)
        np.testing.assert_array_equal(volume.hu, chest())
        assert volume.spacing == pytest.approx((30, 8, 7.7))
        assert preprocess(volume, PreprocessConfig.for_shape((24, 48, 48))).shape == (1, 24, 48, 48)


def test_a_wide_field_is_read(tmp_path):
    path = write_nifti(tmp_path / "wide.nii", chest((8, 96, 100)), np.diag([-7.8, -8, 12.5, 1]))  # 780 mm
    assert read_volume(path).shape == (8, 96, 100)


# --- what is no fault of the file


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 9 GiB"),
        RuntimeError("Exception thrown in SimpleITK: std::bad_alloc"),
        RuntimeError("ITK ERROR: Image: Failed to allocate memory for image."),
        OSError(28, "No space left on device"),
        OSError(5, "Input/output error"),
        OSError("Not enough free space to write 18000000 bytes after offset 128"),
    ],
)
def test_a_fault_of_the_machine_is_not_blamed_on_the_file(error):
    def fail():
        raise error

    with pytest.raises((MemoryError, OSError)) as caught:
        stored.decode(fail)
    assert "damaged" not in str(caught.value)
    with pytest.raises(ValueError, match="truncated or damaged"):
        stored.decode(lambda: gzip.decompress(b"no gzip"))


def test_too_little_memory_names_the_scan(tmp_path, monkeypatch):
    path = nifti()(tmp_path)
    monkeypatch.setattr("medctkit.scans.nifti.check_bytes", lambda *_: np.empty(2**58))
    with pytest.raises(MemoryError, match="scan.nii: too little memory to read it; .*Unable to allocate"):
        read_volume(path)
