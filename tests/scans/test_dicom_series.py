"""DICOM series: which files, in which order, with which values, and what is refused."""

import numpy as np
import pydicom
import pytest
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEGLosslessSV1
from scan_files import SHAPE, SPACING, change, chest, heights, notes, values, write_dicom

from medctkit.cohort.cache import digest_of
from medctkit.cohort.contents import stamp_of
from medctkit.scans.dicom_files import is_dicom
from medctkit.scans.dicom_series import read_dicom
from medctkit.scans.volumes import read_volume

# --- order and orientation -------------------------------------------------------------------------------


def test_slices_are_sorted_by_position_not_by_name(tmp_path):
    hu = chest()
    names = [f"{n:03}.dcm" for n in np.random.default_rng(0).permutation(len(hu))]
    volume = read_volume(write_dicom(tmp_path / "series", hu, names))
    np.testing.assert_array_equal(volume.hu, hu)
    assert volume.orientation == "SPL" and volume.spacing == SPACING and volume.hu.dtype == np.float32
    assert "slope and intercept of the DICOM headers applied" in volume.provenance


def test_full_size_slices_compressed_without_uids_suffixes_and_from_head_to_foot(tmp_path):
    hu = np.repeat(np.repeat(chest((4, 16, 16)), 32, axis=1), 32, axis=2) + np.arange(512, dtype=np.int16) % 7
    names = [f"IM{n}" for n in range(4)]
    tags = dict(SOPInstanceUID="", PixelSpacing=[0.7, 0.7], syntax=JPEGLosslessSV1)
    volume = read_volume(write_dicom(tmp_path, hu, names, step=(0, 0, -15), **tags))
    np.testing.assert_array_equal(volume.hu, hu[::-1])
    assert volume.spacing == (15, 0.7, 0.7)


def test_coronal_slices_are_turned(tmp_path):
    # rows go down from the head, slices from front to back
    folder = write_dicom(tmp_path, chest(), step=(0, SPACING[0], 0), ImageOrientationPatient=[1, 0, 0, 0, 0, -1])
    volume = read_volume(folder)
    np.testing.assert_array_equal(volume.hu, chest().transpose(1, 0, 2)[::-1])
    assert volume.spacing == (SPACING[1], SPACING[0], SPACING[2])


@pytest.mark.parametrize(("sign", "decimals"), [(1, 5), (-1, 5), (1, 3)])
def test_oblique_slices_are_no_tilt(tmp_path, sign, decimals):
    c, s = np.cos(0.3), np.sin(0.3)
    step = np.array([0, -s, c]) * SPACING[0] * sign
    rounded = [1, 0, 0, 0, round(c, decimals), round(s, decimals)]
    write_dicom(tmp_path, chest(), step=step, ImageOrientationPatient=rounded)
    stored = read_dicom(tmp_path)
    np.testing.assert_array_equal(stored.hu, chest()[::sign])
    np.testing.assert_allclose(np.linalg.norm(stored.affine[:3, :3], axis=0), SPACING)
    np.testing.assert_allclose(stored.affine[:3, 0], [0, s * SPACING[0], c * SPACING[0]], atol=1e-4)  # RAS, not LPS
    np.testing.assert_allclose(stored.affine[:3, 3], step * (-1, -1, 1) * 7 if sign < 0 else 0, atol=1e-4)
    assert stored.rescaled


# --- which files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cut",
    [lambda _: 128, lambda _: 132, lambda data: 144 + int.from_bytes(data[140:144], "little")],
    ids=["without preamble", "without preamble and mark", "without meta header"],
)
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian], ids=["explicit", "implicit"])
def test_files_without_preamble_and_suffix(tmp_path, cut, syntax):
    write_dicom(tmp_path, chest(), [f"IMG{i}" for i in range(len(chest()))], syntax=syntax)
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[cut(file.read_bytes()) :])
        assert is_dicom(file)
    np.testing.assert_array_equal(values(tmp_path), chest())


def test_localizers_and_other_files_are_left_out_and_counted(tmp_path):
    write_dicom(tmp_path, chest())
    write_dicom(tmp_path / "scout", chest()[:2], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    write_dicom(tmp_path / "capture", chest()[:1], SOPClassUID="1.2.840.10008.5.1.4.1.1.7", Modality="OT")
    write_dicom(tmp_path / "page", chest()[:1], ImageType=["DERIVED", "SECONDARY", "SCREEN SAVE"])
    for folder, uid in (("dose", "88.67"), ("state", "11.1"), ("contours", "481.3")):
        uid = f"1.2.840.10008.5.1.4.1.1.{uid}"
        write_dicom(tmp_path / folder, chest()[:1], SOPClassUID=uid, PixelData=None, Modality="SR")
    directory = write_dicom(tmp_path / "cd", chest()[:1], ["DICOMDIR"], SOPClassUID=None) / "DICOMDIR"
    change(directory, DirectoryRecordSequence=[pydicom.Dataset()], PixelData=None)
    for name in ("readme.txt", "._000.dcm", ".DS_Store"):
        (tmp_path / name).write_bytes(b"\0\1 notes")
    volume = read_volume(tmp_path)
    assert volume.shape == SHAPE
    assert (
        "left out: DICOMDIR (1), Grayscale Softcopy Presentation State Storage (1), RT Structure Set Storage (1), "
        "X-Ray Radiation Dose SR Storage (1), file that is not DICOM (3), localizer (2), page of text (dose report) "
        "(1), secondary capture (1)"
    ) in volume.provenance


@pytest.fixture
def three_series(tmp_path):
    write_dicom(tmp_path / "a", chest(), series="1.2.3", SeriesNumber=2, ConvolutionKernel="B30f")
    sharp = dict(series="1.2.4", SeriesNumber=3, SeriesDescription="sharp", ConvolutionKernel=["B70f", "3"])
    write_dicom(tmp_path / "b", chest()[:3], **sharp)
    write_dicom(tmp_path / "c", chest()[:5], series="1.2.5", SeriesNumber=2, SeriesDescription="T2", Modality="MR")
    return tmp_path


LISTING = r"""
  series=2: CT 'chest', 8 slices, number 2, kernel B30f, UID 1\.2\.3, such as a/000\.dcm
  series=3: CT 'sharp', 3 slices, number 3, kernel B70f/3, UID 1\.2\.4, such as b/000\.dcm
  series='1\.2\.5': MR 'T2', 5 slices, number 2, kernel not given, UID 1\.2\.5, such as c/000\.dcm$"""


def test_several_series_are_listed(three_series):
    with pytest.raises(ValueError, match=r"3 series in it; choose one by series=.*:" + LISTING):
        read_volume(three_series)


@pytest.mark.parametrize(
    ("series", "n"), [("1.2.3", 8), ("1.2.4", 3), ("3", 3), (3, 3), ("sharp", 3), ("chest", 8), (2, 8)]
)
def test_a_series_is_chosen_by_uid_number_or_description(three_series, series, n):
    assert values(three_series, series).shape == (n, *SHAPE[1:])
    assert ", chosen from 3" in notes(three_series, series)


@pytest.mark.parametrize(
    ("series", "message"),
    [
        ("1.2", "no series in it called '1.2'; choose one by series=.*:" + LISTING),
        ("", "no series in it called ''"),
        ("T2", "c/000.dcm is of modality MR, not a CT; choose or get a CT series"),
    ],
)
def test_a_choice_that_is_none_is_refused_with_the_list(three_series, series, message):
    with pytest.raises(ValueError, match=message):
        values(three_series, series)


def test_series_without_uids_are_not_mixed(tmp_path):
    for folder, start in (("a", 0), ("b", SPACING[0] / 2)):
        tags = dict(SeriesInstanceUID="", SeriesDescription=folder, origin=(0, 0, start))
        write_dicom(tmp_path / folder, chest(), **tags)
    with pytest.raises(ValueError, match="2 series in it.*\n.*'a', 8 slices.*UID not given"):
        values(tmp_path)
    assert values(tmp_path, "b").shape == SHAPE


def test_empty_folders_and_folders_without_slices(tmp_path):
    with pytest.raises(ValueError, match="folder is empty; expected the slices of a DICOM series"):
        read_volume(tmp_path)
    (tmp_path / "scan.txt").write_text("no scan")
    write_dicom(tmp_path / "scout", chest()[:1], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    message = r"no slice of a scan among its 2 files: file that is not DICOM \(1\), localizer \(1\)"
    with pytest.raises(ValueError, match=message):
        read_volume(tmp_path)


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("003.dcm", b"", r"003.dcm can't be read: .*\(0 bytes without a DICOM header"),
        ("003.dcm", b"just a text", r"003.dcm can't be read: .*\(11 bytes without"),
        ("003.dcm", b"<!DOCTYPE html><p>log in", "003.dcm is a web page: its download failed or needs a"),
        ("IM3", b"<html>", "IM3 is a web page"),
        ("IM3", b"", r"IM3 can't be read: .*\(0 bytes without"),
        ("IM3", b"\0\1\2" * 100, r"IM3 can't be read: .*get the file again \(300 bytes without"),
        ("extra.IMA", b"\0", r"extra.IMA can't be read: .*\(1 bytes without .* if it is no slice, take it away"),
    ],
)
def test_files_that_were_to_be_slices_are_named(tmp_path, name, contents, message):
    write_dicom(tmp_path, chest(), None if name.endswith(".dcm") else [f"IM{i}" for i in range(len(chest()))])
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(ValueError, match=message):
        read_volume(tmp_path)


def test_a_read_me_beside_slices_without_suffix_is_left_out(tmp_path):
    write_dicom(tmp_path, chest(), [f"IM{i}" for i in range(len(chest()))])
    (tmp_path / "README").write_text("from the CD")
    assert values(tmp_path).shape == SHAPE and "file that is not DICOM (1)" in notes(tmp_path)


def test_linked_folders_are_read_and_links_that_lead_back_are_not(tmp_path):
    scan = write_dicom(tmp_path / "patient" / "scan", chest()[:4], series="1.2.3")
    write_dicom(tmp_path / "patient" / "other", chest())
    store = write_dicom(tmp_path / "store", chest()[4:], series="1.2.3", origin=(0, 0, 4 * SPACING[0]))
    links = {scan / "rest": store, scan / "up": tmp_path / "patient", scan / "itself": scan, store / "round": scan}
    for link, target in links.items():
        link.symlink_to(target)
    np.testing.assert_array_equal(values(scan), chest())
    before = digest_of(scan), stamp_of(scan)
    change(store / "001.dcm", KVP=100)
    assert not {*before} & {digest_of(scan), stamp_of(scan)}


def test_links_that_lead_nowhere_are_named(tmp_path):
    write_dicom(tmp_path, chest())
    (tmp_path / "008.dcm").symlink_to(tmp_path / "gone.dcm")
    with pytest.raises(ValueError, match="008.dcm is a link that leads nowhere"):
        values(tmp_path)


# --- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        (dict(Modality="MR"), "000.dcm is of modality MR, not a CT"),
        (dict(Modality=None, SOPClassUID="1.2.3"), "modality unknown, not a CT"),
        (
            dict(ImagePositionPatient=None),
            "000.dcm can't be read: .* damaged; get the file again .it has no ImagePositionPatient",
        ),
        (dict(ImagePositionPatient=[1, 2]), r"ImagePositionPatient is \[1.0, 2.0\], expected 3 number"),
        (dict(PixelSpacing=None), "has no PixelSpacing"),
        (dict(PixelSpacing=[0, 0.7]), "PixelSpacing 0/0.7; expected .* lengths above 0 mm"),
        (dict(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), "expected two directions at a right angle"),
        (dict(NumberOfFrames=5), "holds 5 frames and not where each lies; get the slices"),
        (dict(ImagePositionPatient=[0, 0, 0]), "000.dcm and 001.dcm both lie at 0.00 mm, 7 of 8 slices"),
        (dict(step=(0, 1.0, 2.5)), "tilted by 21.8 degrees .*000.dcm to 007.dcm, 17.50 mm.*dcm2niix .*_Tilt"),
        (dict(PixelData=None), "000.dcm can't be read: truncated or damaged; get the file again .it has no pixels"),
        (dict(SamplesPerPixel=3, PhotometricInterpretation="RGB"), "holds RGB with 3 .* Get the original slices"),
        (dict(Rows=65535, Columns=65535), r"its header claims \(8, 65535, 65535\) voxels, 128 GiB: more than any CT"),
        (dict(Rows=600), r"000.dcm can't be read: truncated .*240 bytes of pixels, its header says 12000 \(600 x 10\)"),
        (dict(Rows=11), r"000.dcm can't be read: truncated .*240 bytes of pixels, its header says 220 \(11 x 10\)"),
        (dict(Columns=9), r"240 bytes of pixels, its header says 216 \(12 x 9\)"),
        (dict(Rows=None), "000.dcm can't be read: .*it has no Rows"),
        (dict(BitsAllocated=12), "000.dcm is damaged, or no CT: BitsAllocated 12, BitsStored 16"),
        (dict(HighBit=11), "HighBit 11, PixelRepresentation 1; a CT has 12 to 16 of 16 bits"),
        (dict(BitsStored=None), "BitsStored is None, expected a whole number"),
        (dict(RescaleIntercept=None), "headers lack slope and intercept; pass rescale_slope"),
        (dict(RescaleSlope=0), "000.dcm has RescaleSlope 0, expected one above 0"),
        (dict(RescaleType="Z_EFF"), "000.dcm is not in HU: its RescaleType is Z_EFF"),
        (dict(ModalityLUTSequence=[]), "000.dcm turns stored values into HU by a table"),
    ],
)
def test_series_that_are_no_ct_volume_are_refused(tmp_path, tags, message):
    with pytest.raises(ValueError, match=message):
        read_volume(write_dicom(tmp_path, chest(), **tags))


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        (dict(ConvolutionKernel="B70f"), r"ConvolutionKernel B30f \(7, such as 000.dcm\), B70f \(1, such as 005.dcm"),
        (dict(ImagePositionPatient=[30, 0, 5 * SPACING[0]]), "005.dcm lies 30.00 mm beside the line from 000.dcm to"),
    ],
)
def test_a_slice_unlike_the_others_is_refused(tmp_path, tags, message):
    change(write_dicom(tmp_path, chest(), ConvolutionKernel="B30f") / "005.dcm", **tags)
    with pytest.raises(ValueError, match=message):
        read_volume(tmp_path)


def test_unspecified_rescale_types_are_taken_for_hu_and_said(tmp_path):
    write_dicom(tmp_path, chest(), RescaleType="US")
    assert "RescaleType US of the headers taken for HU" in notes(tmp_path)


@pytest.mark.parametrize(
    ("zs", "message"),
    [
        ([0, 2, 4, 8, 10], "missing slices: 4.00 mm from 002.dcm to 003.dcm, other slices 2.00 mm; 1 missing in 1"),
        ([0, 2, 4, 8, 10, 12, 18, 20], r"4.00 mm from .* 3 missing in 2 .* or pass resample=True"),
        ([0.0, 2.0, 6.0, 8.0, 12.0, 14.0, 18.0, 20.0], "missing slices: 4.00 mm .* 3 missing in 3"),
        ([0.5, 2.5, 4.5, 6.5, 9.5, 11.5, 13.5, 15.5], "uneven gaps .* 3.00 mm from 003.dcm to 004.dcm"),
        ([0, 2, 4, 4, 6, 8], "duplicate slices: 002.dcm and 003.dcm both lie at 4.00 mm, 1 of 6 .* leave one slice in"),
        ([0, 0, 2, 2, 4, 4], "duplicate slices: 000.dcm and 001.dcm both lie at 0.00 mm, 3 of 6 slices"),
        (
            [0, 2, 4, 7, 9, 10.4],
            "uneven gaps between slices: 1.40 mm from 004.dcm to 005.dcm, 3.00 mm from 002.dcm to 003.dcm, "
            "median 2.00 mm; get a reconstruction with even steps, or pass resample=True to interpolate",
        ),
        ([i * 2 for i in range(20)] + [38 + i * 2.15 for i in range(1, 20)], "uneven gaps between slices: 2.00 mm"),
    ],
)
def test_gaps_are_told_apart(tmp_path, zs, message):
    write_dicom(tmp_path, chest((len(zs), *SHAPE[1:])), each=heights(zs))
    with pytest.raises(ValueError, match=message):
        read_volume(tmp_path)


def test_slices_of_two_sizes_are_refused(tmp_path):
    write_dicom(tmp_path, chest(), series="1.2.3")
    write_dicom(tmp_path, chest()[:1, :, :5], names=["small.dcm"], series="1.2.3")
    with pytest.raises(ValueError, match="Columns changes along the series: 10 in 000.dcm, 5 in small.dcm"):
        read_volume(tmp_path)


def test_a_single_slice_is_refused(tmp_path):
    write_dicom(tmp_path, chest()[:1])
    with pytest.raises(ValueError, match="000.dcm is the only slice; .* give its folder"):
        read_volume(tmp_path / "000.dcm")


def test_dicom_is_not_rescaled_twice(tmp_path):
    with pytest.raises(ValueError, match="headers have a slope and intercept of their own; leave out"):
        read_volume(write_dicom(tmp_path, chest()), rescale_intercept=-1024)
