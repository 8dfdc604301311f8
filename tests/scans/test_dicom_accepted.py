"""DICOM as it is found in practice: each form is written as a phantom and read back voxel for voxel."""

import base64
import re
import shutil

import numpy as np
import pytest
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)
from scan_files import SHAPE, SPACING, change, chest, enhanced, heights, notes, repack, truncate, values, write_dicom

from medctkit.scans.dicom_series import read_dicom
from medctkit.scans.volumes import read_volume

CLASS = "1.2.840.10008.5.1.4.1.1."


def check(folder, expected=None, **choices):
    """The series is read, voxel for voxel, with its size; returns the notes."""
    volume = read_volume(folder, **choices)
    np.testing.assert_array_equal(volume.hu, chest() if expected is None else expected)
    assert volume.spacing == pytest.approx(SPACING) and volume.orientation == "SPL"
    return "; ".join(volume.provenance)


# --- several scans under one series UID ------------------------------------------------------------------


APART = {"half a step apart": 0.5, "in the same places": 0, "one above the other": 8}


@pytest.mark.parametrize(
    ("tag", "one", "other", "apart"),
    [(tag, "A", "B", apart) for apart in APART for tag in ("PatientID", "StackID")]
    + [
        ("AcquisitionNumber", 1, 2, "one above the other"),
        ("AcquisitionNumber", 0, 1, "in the same places"),
        ("StudyInstanceUID", "1.2.8", "1.2.9", "half a step apart"),
        ("FrameOfReferenceUID", "1.2.8", "1.2.9", "half a step apart"),
        ("SOPClassUID", CLASS + "2", CLASS + "29", "half a step apart"),
        ("SeriesNumber", 3, 4, "half a step apart"),
        ("KVP", 80, 140, "in the same places"),
        ("ConvolutionKernel", "B30f", "B70f", "in the same places"),
        ("SliceThickness", 1.25, 5, "half a step apart"),
        ("ImageType", "ORIGINAL/PRIMARY/AXIAL", "DERIVED/SECONDARY/MIP", "half a step apart"),
    ],
)
def test_scans_in_one_series_are_refused_or_chosen(tmp_path, tag, one, other, apart):
    written = {value: str(value).split("/") if tag == "ImageType" else value for value in (one, other)}
    write_dicom(tmp_path, chest(), series="1.2.3", **{tag: written[one]})
    names, origin = [f"b{i}" for i in range(SHAPE[0])], (0, 0, APART[apart] * SPACING[0])
    write_dicom(tmp_path, chest() - 5, names, origin=origin, series="1.2.3", **{tag: written[other]})
    listing = rf"\n  {tag} {one} \(8, such as 000.dcm\), {other} \(8, such as b0\)"
    with pytest.raises(ValueError, match=f"slices of several scans.*acquisition=.*{listing}"):
        read_volume(tmp_path)
    assert f"acquisition {one}: 8 of 16 slices" in check(tmp_path, acquisition=one)
    check(tmp_path, chest() - 5, acquisition=str(other))
    with pytest.raises(ValueError, match=rf"no slice of acquisition='x'.*\n  {tag}"):
        read_volume(tmp_path, acquisition="x")


@pytest.mark.parametrize(
    ("numbers", "good"),
    [
        ([1, 1, 2, 2, 3, 3, 4, 4], False),
        ([1, 4, 2, 3, 3, 2, 4, 1], False),
        ([1, 2, 3, 4, 1, 2, 3, 4], False),
        ([0, 1, 2, 3, 0, 1, 2, 3], False),
        ([1, 5, 2, 6, 3, 7, 4, 8], False),
        ([8, 1, 7, 2, 6, 3, 5, 4], False),
        ([1, 2, 3, 1, 2, 3, 1, 2], True),  # counted anew in each shot
        ([1, 2, 3, 3, 4, 5, 6, 7], True),
        ([5, 5, 5, 5, 5, 5, 5, 5], True),
        ([8, 2, 5, 1, 7, 3, 6, 4], True),
    ],
)
def test_scans_that_only_the_numbers_of_their_slices_tell_apart(tmp_path, numbers, good):
    write_dicom(tmp_path, chest(), each={"InstanceNumber": numbers})
    if not good:
        with pytest.raises(ValueError, match="InstanceNumber .*two scans in one series"):
            read_volume(tmp_path)
    check(tmp_path, acquisition=None if good else "all")


@pytest.mark.parametrize("kind", ["DERIVED/SECONDARY/MIP", "DERIVED/SECONDARY/AXIAL/MINIMUM"])
def test_a_projection_through_slices_is_read_only_when_asked_for(tmp_path, kind):
    write_dicom(tmp_path, chest(), ImageType=kind.split("/"))
    with pytest.raises(ValueError, match=rf"000.dcm is a projection .*\(ImageType {kind}\); get the series"):
        read_volume(tmp_path)
    check(tmp_path, acquisition="all")


def test_a_choice_among_slices_of_one_acquisition(tmp_path):
    write_dicom(tmp_path, chest(), AcquisitionNumber=3)
    check(tmp_path, acquisition=3)
    with pytest.raises(ValueError, match="no slice of acquisition='4'; there are: all slices are of one acquisition"):
        read_volume(tmp_path, acquisition=4)


def test_one_scan_with_numbers_of_its_own_for_each_slice_can_be_asked_for(tmp_path):
    write_dicom(tmp_path, chest(), each={"FrameOfReferenceUID": [f"1.2.{i}" for i in range(SHAPE[0])]})
    with pytest.raises(ValueError, match=r"FrameOfReferenceUID 1.2.0 .* and 3 more"):
        read_volume(tmp_path)
    assert "unlike in FrameOfReferenceUID taken for one scan, as asked for" in check(tmp_path, acquisition="all")


@pytest.mark.parametrize(
    ("numbers", "good"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8], True),  # a shot for each slice
        ([1, 2, 2, 2, 3, 3, 3, 4], True),
        ([1, 1, 1, 2, 2, 2, 3, 3], True),
        ([1, 1, 1, 1, 2, 2, 2, 2], False),
        ([1, 2, 1, 2, 1, 2, 1, 2], False),
        ([1, 1, 1, 1, 2, 3, 4, 4], False),
    ],
)
def test_shots_of_a_table_that_moves_are_one_scan(tmp_path, numbers, good):
    write_dicom(tmp_path, chest(), each={"AcquisitionNumber": numbers})
    if good:
        assert "acquisitions side by side" in check(tmp_path)
    else:
        with pytest.raises(ValueError, match="slices of several scans.*\n  AcquisitionNumber"):
            read_volume(tmp_path)


@pytest.mark.parametrize("tags", [dict(SOPClassUID=CLASS + "7"), dict(SOPClassUID=CLASS + "8", PixelData=None)])
def test_a_slice_with_a_broken_class_is_not_dropped(tmp_path, tags):
    change(write_dicom(tmp_path, chest()) / "007.dcm", **tags)
    with pytest.raises(ValueError, match=f"007.dcm lies among the slices, and is a .* {tags['SOPClassUID']}"):
        read_volume(tmp_path)


@pytest.mark.parametrize("which", [[5], [4, 5, 6, 7], [0]])
def test_unequal_rescaling_must_fit_the_neighbours(tmp_path, which):
    write_dicom(tmp_path, chest(), slope=0.5, intercept=-1000)
    for i in which:
        file = tmp_path / f"{i:03}.dcm"
        stored = np.round((chest()[i] + 2048) / 2).astype("<i2")
        change(file, RescaleSlope=2, RescaleIntercept=-2048, PixelData=stored.tobytes())
    assert "2 different slopes and intercepts" in notes(tmp_path)
    assert np.abs(values(tmp_path) - chest()).max() <= 1  # as finely as a slope of 2 stores them
    for i in which:
        change(tmp_path / f"{i:03}.dcm", RescaleSlope=0.5, RescaleIntercept=1000)
    with pytest.raises(ValueError, match=f"slope .* {which[0] or 1:03}.dcm .*its values fit those of the other"):
        read_volume(tmp_path)


# --- what lies beside the scan ---------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["a file", "a folder", "another transfer syntax"])
def test_exact_copies_are_left_out(tmp_path, form):
    write_dicom(tmp_path / "a", chest(), series="1.2.3")
    if form == "a file":
        shutil.copy(tmp_path / "a" / "003.dcm", tmp_path / "a" / "003 (1).dcm")
    else:
        shutil.copytree(tmp_path / "a", tmp_path / "b")
    if form == "another transfer syntax":
        write_dicom(tmp_path / "b", chest(), series="1.2.3", syntax=RLELossless)
    assert f"exact copy of a slice ({1 if form == 'a file' else 8})" in check(tmp_path)
    change(tmp_path / "a" / "003.dcm", RescaleIntercept=-1025)
    with pytest.raises(ValueError, match=r"a/003.* both lie at 37.50 mm, 1 of "):
        read_volume(tmp_path)


@pytest.mark.parametrize(
    ("kind", "modality"), [("481.2", "RTDOSE"), ("66.4", "SEG"), ("30", "OT"), ("128", "PT"), ("4", "MR")]
)
def test_the_only_ct_is_read(tmp_path, kind, modality):
    write_dicom(tmp_path / "ct", chest())
    other = dict(SOPClassUID=CLASS + kind, Modality=modality, ImagePositionPatient=[0, 0, 0], NumberOfFrames=3)
    other |= {"PixelData": None, "FloatPixelData": bytes(480)} if kind == "30" else {}
    write_dicom(tmp_path / "other", chest()[:1], **other)
    said = check(tmp_path)
    assert "series CT 'chest', 8 slices" in said or re.search(
        r"left out: (Segmentation|Parametric Map) Storage \(1\)", said
    )


def test_a_picture_without_a_place_is_left_out_but_not_slices(tmp_path):
    write_dicom(tmp_path, chest(), series="1.2.3")
    nowhere = dict(ImagePositionPatient=None, ImageOrientationPatient=None)
    write_dicom(tmp_path, chest()[:1], names=["page.dcm"], series="1.2.3", **nowhere, PixelSpacing=None)
    assert "left out: picture without a place in the patient (1)" in check(tmp_path)
    change(tmp_path / "007.dcm", **nowhere)
    with pytest.raises(ValueError, match="2 of 9 slices have no ImagePositionPatient, such as 007.dcm"):
        read_volume(tmp_path)


def test_a_folder_of_another_format_or_of_captures_is_named(tmp_path):
    (tmp_path / "scan.nii.gz").touch()
    with pytest.raises(ValueError, match=r"file that is not DICOM \(1\), such as scan.nii.gz; give the scan itself"):
        read_volume(tmp_path)
    write_dicom(tmp_path / "b", chest(), SOPClassUID=CLASS + "7")
    with pytest.raises(ValueError, match=r"secondary capture \(8\), .*not measured values"):
        read_volume(tmp_path / "b")


# --- what headers say and lack ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tags", "choices"),
    [
        (dict(Modality=None), {}),
        (dict(Modality=""), {}),
        (dict(PhotometricInterpretation="MONOCHROME1"), {}),
        (dict(PixelSpacing=None), dict(spacing=SPACING)),
        (dict(PixelSpacing=[0, 0]), dict(spacing=SPACING)),
        (dict(RescaleSlope=None), dict(rescale_slope=1, rescale_intercept=-1024)),
        (dict(RescaleIntercept=None), dict(rescale_slope=1, rescale_intercept=-1024)),
    ],
    ids=str,
)
def test_what_headers_lack(tmp_path, tags, choices):
    check(write_dicom(tmp_path, chest(), **tags), **choices)


@pytest.mark.parametrize("lost", [["RescaleSlope"], ["RescaleSlope", "RescaleIntercept"]])
def test_what_the_header_of_a_slice_lacks_is_given(tmp_path, lost):
    change(write_dicom(tmp_path, chest()) / "005.dcm", **dict.fromkeys(lost))
    with pytest.raises(ValueError, match="lack slope .*pass rescale_slope"):
        read_volume(tmp_path)
    check(tmp_path, rescale_slope=1, rescale_intercept=-1024)
    change(tmp_path / "003.dcm", RescaleIntercept=-1000)
    with pytest.raises(ValueError, match="005.dcm has no RescaleSlope or .*those of others differ"):
        read_volume(tmp_path, rescale_slope=1, rescale_intercept=-1024)


@pytest.mark.parametrize("padding", [-2000, -9999, -32768])
@pytest.mark.parametrize("tagged", [True, False])
def test_what_was_not_scanned(tmp_path, padding, tagged):
    hu = chest()
    hu[:, :2], hu[:, -1:] = padding, padding
    write_dicom(tmp_path, hu, intercept=0, **(dict(PixelPaddingValue=padding) if tagged else {}))
    expected = np.where(hu == padding, padding if padding == -2000 and not tagged else -1024, hu)
    check(tmp_path, expected)


@pytest.mark.parametrize(("step", "decimals"), [(0.625, 1), (1.25, 1), (1.333, 1), (2.5, 0), (3.333, 0), (3.98734, 3)])
def test_rounded_positions_are_even(tmp_path, step, decimals):
    write_dicom(tmp_path, chest((80, 4, 4)), each=heights(round(i * step - 100, decimals) for i in range(80)))
    stored = read_dicom(tmp_path)
    np.testing.assert_array_equal(stored.hu, chest((80, 4, 4)))
    assert stored.affine[2, 0] == pytest.approx(step, rel=1e-2)


# --- enhanced CT and HTJ2K -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("syntax", "frames"),
    [(DeflatedExplicitVRLittleEndian, 8), (RLELossless, 8), (JPEGLSLossless, 3), (JPEG2000Lossless, 8)]
    + [(ExplicitVRLittleEndian, frames) for frames in (8, 3, 1)],
)
def test_enhanced_files_are_read(tmp_path, syntax, frames):
    downwards = (0, 0, -SPACING[0])
    write_dicom(tmp_path, chest(), syntax=syntax, AcquisitionNumber=1, ConvolutionKernel="B30f", step=downwards)
    files = np.random.default_rng(0).permutation(sorted(tmp_path.iterdir()))
    for i in range(0, len(files), frames):
        enhanced(files[i : i + frames], tmp_path / f"enhanced{i}.dcm")
    check(tmp_path, chest()[::-1])
    if frames == 8:
        check(tmp_path / "enhanced0.dcm", chest()[::-1])


def test_frames_of_an_enhanced_file_are_guarded_as_slices(tmp_path):
    write_dicom(tmp_path, chest())
    change(tmp_path / "003.dcm", AcquisitionNumber=2)
    path = enhanced(sorted(tmp_path.iterdir()), tmp_path / "e.dcm")
    with pytest.raises(ValueError, match=r"AcquisitionNumber not given .*2 \(1, such as e.dcm \(frame 4\)\)"):
        read_volume(path)
    with pytest.raises(ValueError, match="missing slices: 25.00 mm from e.dcm .frame 3. to e.dcm .frame 5."):
        read_volume(path, acquisition="")
    change(path, NumberOfFrames=7)
    with pytest.raises(ValueError, match="NumberOfFrames is 7, and 8 are described"):
        read_volume(path)
    change(path, NumberOfFrames=8, PixelData=bytes(100))
    with pytest.raises(ValueError, match=r"e.dcm .frame 1. can't be read.* its header says 1920 .8 x 12 x 10"):
        read_volume(path, acquisition="all")


# two slices of 20 x 24 pixels, 16 bits with a sign, as OpenJPH compresses them without loss
HTJ2K_SLICES = [
    (
        "|4;u>04YEK0000O0000K00000000000000O0000K000000000000EBy0sl|{2mk^A000XAQUDA90ssL31q1{@0smY86Cj9?kdTm&kdTm&kdTmwh="
        "~7W02crOPjF>!N>E53R%LP^FfKASE;BCwkN^q*00000ssI81lfVEb@%#dZbO68r62JfwfQkZ#bO7Q2hjakI029Cf5r9Q3;sT3w0083vzyKD6009_"
        "$_{fkE!H10a880zF`nLcS69B*f7Q6rfQuEJu<3{u6yKy53^WFG{fBnoljDeW|%*@R6-buc;0Kfn(xBvxkg9kHsFoOp(crb$p^Vi@kPFS3=Ibweh0"
        ")7Al0092~O<w)izjf@o0RPz"
    ),
    (
        "|4;u>04YEK0000O0000K00000000000000O0000K000000000000EBy0sl|{2mk^A000XAQUDA90ssL31q1{@0smY86Cj9?kdTm&kdTm&kdTmwh="
        "~7W02crOPjF>!N>E53R%LP^FfKASE;BCwkN^q*00000a{vMVlfVEa&;W;Y0KfnezyK0}-~b170OA0LbO4|L2*3d20KfnfzyJ||2>gWpOLYJg69B*"
        "f6F>kJAmH3|@^t{r%*^!ONxrrKzyK;>02ROh{PXw)DNE-71ONd3|4m-~*S~e_x&Z&#"
    ),
]


def test_high_throughput_jpeg_2000_is_read(tmp_path):
    hu = chest((3, 20, 24))
    hu[0, :, :12], hu[1:, :, :12] = chest((1, 20, 24))[0, :, :12] - 900, chest((3, 20, 24))[1:, :, :12]
    write_dicom(tmp_path, hu[:2], intercept=0)
    for file, picture in zip(sorted(tmp_path.iterdir()), HTJ2K_SLICES, strict=True):
        repack(file, base64.b85decode(picture), HTJ2KLossless)
    np.testing.assert_array_equal(values(tmp_path), hu[:2])
    truncate(tmp_path / "001.dcm", 0.9)
    with pytest.raises(ValueError, match="001.dcm.*(truncated|damaged)"):
        values(tmp_path)


# --- slices that are brought onto an even grid -----------------------------------------------------------


@pytest.mark.parametrize("zs", [[0, 1, 2, 3, 5, 6, 8], [0, 1, 2, 4, 5, 6, 7], [0, 2, 3, 4, 5, 6, 7]])
def test_missing_slices_are_interpolated_when_asked_for(tmp_path, zs):
    hu = chest((len(zs), *SHAPE[1:]))
    write_dicom(tmp_path, hu, each=heights(z * 8 for z in zs))
    with pytest.raises(ValueError, match="missing slices: 16.00 mm .*resample=True"):
        read_volume(tmp_path)
    volume = read_volume(tmp_path, resample=True)
    expected = [np.interp(range(zs[-1] + 1), zs, column) for column in hu.reshape(len(zs), -1).T]
    np.testing.assert_allclose(volume.hu.reshape(zs[-1] + 1, -1).T, expected, atol=1e-3)
    np.testing.assert_array_equal(volume.hu[zs], hu)
    assert volume.spacing[0] == 8 and f"interpolated to {zs[-1] + 1}, 8.00 mm apart" in "; ".join(volume.provenance)


def test_uneven_slices_are_interpolated_when_asked_for(tmp_path):
    zs = np.array([0, 7, 14, 21, 31, 41, 51, 61.0])
    d, h, w = np.indices(SHAPE)
    hu = np.round(zs[d] * 10 + h * 5 + w - 900 * (w < 5)).astype(np.int16)  # linear from slice to slice
    write_dicom(tmp_path, hu, each=heights(zs + 3))
    with pytest.raises(ValueError, match="uneven gaps .* 7.00 mm from .*resample=True"):
        read_volume(tmp_path)
    volume = read_volume(tmp_path, resample=True)
    new = volume.affine[2, 3] - 3 + volume.spacing[0] * np.arange(volume.shape[0])
    assert (new[0], new[-1]) == pytest.approx((0, 61))
    np.testing.assert_allclose(volume.hu, (new[:, None, None] * 10 + (hu - zs[d] * 10)[:1]), atol=0.01)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_tilted_scan_is_sheared_straight_when_asked_for(tmp_path, sign):
    whole = chest((8, 34, 10))
    first = [7 + sign * (i - 3) if sign > 0 else 7 + sign * (i - 4) for i in range(8)]  # row where each slice starts
    slices = np.stack([hu[row : row + 20] for hu, row in zip(whole, first, strict=True)])
    write_dicom(tmp_path, slices, step=(0, sign * SPACING[1], 20), origin=(5, first[0] * SPACING[1], 7))
    with pytest.raises(ValueError, match="tilted by 21.8 degrees.*resample=True.*dcm2niix.*_Tilt"):
        read_volume(tmp_path)
    volume = read_volume(tmp_path, resample=True)
    expected = np.full((8, 27, 10), -1024)
    for i, row in enumerate(first):
        expected[i, row - min(first) : row - min(first) + 20] = slices[i]
    np.testing.assert_array_equal(volume.hu, expected)
    np.testing.assert_array_equal(volume.hu[:, 7:20], whole[:, min(first) + 7 : min(first) + 20])
    assert volume.spacing == (20, *SPACING[1:]) and "sheared straight, as asked" in "; ".join(volume.provenance)
    np.testing.assert_allclose(volume.affine[:3, 3], (-5, -min(first) * SPACING[1], 7), atol=1e-3)


def test_a_tilt_of_parts_of_a_pixel(tmp_path):
    d, h, w = np.indices((8, 30, 10))
    tilt = 0.6
    hu = np.round(100 * (h + tilt * d) + w - 2000).astype(np.int16)  # linear along the patient's back
    write_dicom(tmp_path, hu, step=(0, tilt * SPACING[1], 12))
    stored = read_dicom(tmp_path, resample=True)
    rows = slice(8, 28)
    np.testing.assert_allclose(stored.hu[:, rows], np.broadcast_to(100 * h + w - 2000, hu.shape)[:, rows], atol=0.1)


# --- limits ----------------------------------------------------------------------------------------------


def test_a_small_series_can_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("medctkit.scans.limits.RATIO_FROM", 1 << 20)
    monkeypatch.setattr("medctkit.scans.limits.MOST_RATIO", 20)
    blank = np.full((8, 400, 400), 40)
    for syntax in (DeflatedExplicitVRLittleEndian, RLELossless):
        folder = write_dicom(tmp_path / syntax, blank, syntax=syntax)
        with pytest.raises(ValueError, match="2560000 bytes of voxels in .* bytes of files"):
            values(folder)
    with pytest.raises(ValueError, match="can't be read: .* bytes of pixels, its header says 320000"):
        monkeypatch.setattr("medctkit.scans.dicom_files._LARGEST_SLICE", 100_000)
        read_volume(write_dicom(tmp_path / "a", blank[:2], syntax=DeflatedExplicitVRLittleEndian))
