"""Values of DICOM slices: transfer syntaxes, bits, slope and intercept, padding, and damage."""

import subprocess
import tempfile

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.uid import (
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)
from scan_files import COMPRESSED, SYNTAXES, change, chest, notes, repack, truncate, values, write_dicom

from medctkit.scans.dicom_pixels import PixelReader


# SimpleITK writes 16 bits always; 12 bits of JPEG Lossless have a test of their own below
@pytest.mark.parametrize(
    ("syntax", "signed", "bits"),
    [
        (syntax, signed, bits)
        for syntax in SYNTAXES
        for signed in (1, 0)
        for bits in ((16,) if syntax in (JPEGLosslessSV1, JPEG2000Lossless) else (16, 12))
    ],
    ids=lambda value: getattr(value, "keyword", value),
)
def test_every_transfer_syntax_gives_the_stored_values(tmp_path, syntax, signed, bits):
    hu = chest((3, 20, 24))
    hu[0, 0, :2] = (-1024, 1023)
    intercept = 0 if signed else -1024
    tags = dict(PixelRepresentation=signed, BitsStored=bits, HighBit=bits - 1, SOPInstanceUID="")
    folder = write_dicom(tmp_path, hu, syntax=syntax, intercept=intercept, **tags)
    found = values(folder)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, hu)


def lossless_jpeg(stored, bits):
    """JPEG Lossless, selection value 1, as in ISO 10918-1 annex H, with one code of five bits for each category."""
    rows, columns = stored.shape
    x = stored.astype(int) & (2**bits - 1)
    predicted = np.empty_like(x)
    predicted[:, 1:], predicted[1:, 0], predicted[0, 0] = x[:, :-1], x[:-1, 0], 2 ** (bits - 1)
    differences = (x - predicted + 2**15) % 2**16 - 2**15
    text = ""
    for d in differences.ravel().tolist():
        category = abs(d).bit_length()
        text += f"{category:05b}" + (f"{d if d > 0 else d + 2**category - 1:0{category}b}" if category else "")
    text += "1" * (-len(text) % 8)
    scan = int(text, 2).to_bytes(len(text) // 8, "big").replace(b"\xff", b"\xff\0")

    def segment(marker, body):
        return bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body

    size = bytes([bits]) + rows.to_bytes(2, "big") + columns.to_bytes(2, "big")
    table = bytes([0]) + bytes([0, 0, 0, 0, 17] + [0] * 11) + bytes(range(17))
    head = segment(0xC3, size + b"\x01\x01\x11\0") + segment(0xC4, table) + segment(0xDA, b"\x01\x01\0\x01\0\0")
    return b"\xff\xd8" + head + scan + b"\xff\xd9"


@pytest.mark.parametrize(("signed", "bits"), [(0, 12), (1, 12), (0, 16), (1, 16)])
def test_jpeg_lossless_of_12_and_16_bits_by_another_encoder(tmp_path, signed, bits):
    hu = chest((2, 20, 24))
    intercept = 0 if signed else -1024
    tags = dict(PixelRepresentation=signed, BitsStored=bits, HighBit=bits - 1)
    folder = write_dicom(tmp_path, hu, intercept=intercept, **tags)
    for file in folder.iterdir():
        repack(file, lossless_jpeg(pydicom.dcmread(file).pixel_array, bits), JPEGLosslessSV1)
    np.testing.assert_array_equal(values(folder), hu)


@pytest.mark.slow
def test_lossy_compression_is_read_and_said(tmp_path):
    hu = chest()
    folder = write_dicom(tmp_path, hu)
    for file in folder.iterdir():
        header = pydicom.dcmread(file)
        header.compress(JPEGLSNearLossless, jls_error=3, generate_instance_uid=False)
        header.LossyImageCompression, header.LossyImageCompressionRatio = "01", "7.5"
        header.save_as(file)
    assert 0 < np.abs(values(folder) - hu).max() <= 3
    assert "lossy compression, ratio 7.5 (JPEG-LS Lossy (Near-Lossless)" in notes(folder)
    assert "in 8 of 8 slices" in notes(folder)
    change(folder / "003.dcm", LossyImageCompression=None, LossyImageCompressionRatio=None)
    assert "possibly lossy compression, ratio not given (JPEG-LS Lossy" in notes(folder)


def test_lossy_compression_in_the_past_is_said(tmp_path):
    write_dicom(tmp_path / "a", chest(), LossyImageCompression="01", LossyImageCompressionRatio=[10, 2])
    assert "lossy compression, ratio 10/2 (before it was stored), in 8 of 8 slices" in notes(tmp_path / "a")
    write_dicom(tmp_path / "b", chest(), LossyImageCompression="01", LossyImageCompressionRatio="9.1")
    for file in (tmp_path / "b").iterdir():
        file.write_bytes(file.read_bytes().replace(b"9.1 ", b"10:1"))  # no number, and no reason to refuse
    assert "lossy compression, ratio 10:1" in notes(tmp_path / "b")


def test_values_are_those_of_simpleitk(tmp_path):
    write_dicom(tmp_path, chest(), slope=0.7381, intercept=-1023.4)
    files = [str(file) for file in sorted(tmp_path.iterdir())]
    np.testing.assert_array_equal(values(tmp_path), sitk.GetArrayFromImage(sitk.ReadImage(files)).astype(np.float32))


def test_unused_bits_are_no_part_of_the_values(tmp_path):
    hu = chest()
    write_dicom(tmp_path, hu, PixelRepresentation=0, BitsStored=12, HighBit=11)
    for file in tmp_path.iterdir():  # old scanners kept overlays there
        header = pydicom.dcmread(file)
        change(file, PixelData=(np.frombuffer(header.PixelData, "<u2") | 0x9000).tobytes())
    np.testing.assert_array_equal(values(tmp_path), hu)


@pytest.mark.parametrize(
    ("hu", "padding", "tags"),
    [
        (-2000, ("US", 63536), dict(intercept=0)),
        (-2000, ("SS", -2000), dict(intercept=0)),
        (63536 - 1024, ("US", 63536), dict(PixelRepresentation=0)),  # not metal
    ],
)
def test_padding_that_no_hu_can_be_becomes_air(tmp_path, hu, padding, tags):
    padded, expected = chest().astype(np.int32), chest()
    padded[:, 0, 0], expected[:, 0, 0] = hu, -1024
    for file in write_dicom(tmp_path, padded, **tags).iterdir():
        header = pydicom.dcmread(file)
        header.add_new("PixelPaddingValue", *padding)
        header.save_as(file)
    np.testing.assert_array_equal(values(tmp_path), expected)
    note = "0.83% of the voxels are padding (PixelPaddingValue) outside of (-1024, 3071) HU; set to -1024"
    assert note in notes(tmp_path)


def test_padding_ranges_and_padding_that_looks_like_tissue(tmp_path):
    hu = chest()
    hu[:, 0, :3] = (-3000, -2500, -2000)
    write_dicom(tmp_path / "range", hu, intercept=0, PixelPaddingValue=-2000, PixelPaddingRangeLimit=-3000)
    assert (values(tmp_path / "range")[:, 0, :3] == -1024).all()
    tissue = int(chest()[0, 5, 8])
    write_dicom(tmp_path / "tissue", chest(), intercept=0, PixelPaddingValue=tissue)
    np.testing.assert_array_equal(values(tmp_path / "tissue"), chest())
    assert "padding" not in notes(tmp_path / "tissue")


# --- what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uid", "name"),
    [
        ("1.2.840.10008.1.2.4.94", "JPIP Referenced"),
        ("1.2.840.10008.1.2.4.100", "MPEG2 Main Profile"),
        ("1.2.840.113619.5.2", "an unknown transfer syntax|GE Private"),
    ],
)
def test_transfer_syntaxes_that_are_not_read_are_named(tmp_path, uid, name):
    write_dicom(tmp_path, chest(), syntax=RLELossless)
    header = pydicom.dcmread(tmp_path / "000.dcm")
    header.file_meta.TransferSyntaxUID = uid
    header.save_as(tmp_path / "000.dcm", implicit_vr=False, little_endian=True)
    with pytest.raises(ValueError, match=rf"000.dcm is compressed as ({name}).*{uid}.*export it again uncompressed"):
        values(tmp_path)


@pytest.mark.parametrize(
    ("syntax", "said", "message"),
    [
        (RLELossless, ExplicitVRLittleEndian, "Explicit VR Little Endian, its pixels are compressed"),
        (ExplicitVRLittleEndian, RLELossless, "RLE Lossless, its pixels are not compressed"),
    ],
)
def test_a_header_that_contradicts_the_pixels_is_refused(tmp_path, syntax, said, message):
    file = write_dicom(tmp_path, chest(), syntax=syntax) / "000.dcm"
    file.write_bytes(file.read_bytes().replace(syntax.encode() + b"\0", said.encode() + b"\0"))
    with pytest.raises(ValueError, match=f"000.dcm can't be read: .* {message}"):
        values(tmp_path)


def test_a_compressed_picture_of_another_size_is_refused(tmp_path):
    write_dicom(tmp_path, chest(), syntax=JPEGLSLossless)
    for file in tmp_path.iterdir():
        change(file, Rows=2000)
    with pytest.raises(ValueError, match="000.dcm can't be read: .*get the file again"):
        values(tmp_path)


@pytest.mark.parametrize(
    ("syntax", "share"),
    [(syntax, 0.7) for syntax in COMPRESSED] + [(ExplicitVRLittleEndian, share) for share in (0.0, 0.15, 0.6, 0.95)],
)
def test_a_truncated_slice_is_named(tmp_path, syntax, share):
    write_dicom(tmp_path, chest((3, 40, 40)), syntax=syntax)
    truncate(tmp_path / "001.dcm", share)
    with pytest.raises(ValueError, match="001.dcm.*(truncated|damaged)"):
        values(tmp_path)


def test_pictures_that_crash_the_decoder_are_errors_and_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    write_dicom(tmp_path / "a", chest((3, 40, 40)), syntax=RLELossless)
    file = tmp_path / "a" / "001.dcm"
    data = file.read_bytes()
    at = data.index(b"\x02\0\0\0\x40\0\0\0")  # the number of segments: none divides by zero
    file.write_bytes(data[:at] + b"\0" + data[at + 1 :])
    with pytest.raises(
        ValueError, match="001.dcm can't be read: truncated or damaged; get the file again .the decoder broke down"
    ):
        values(tmp_path / "a")
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize(
    ("decoder", "error", "message"),
    [("echo 28", OSError, "No space left on device"), ("kill -9 $$", MemoryError, "decompresses slices was stopped")],
)
def test_a_full_disk_and_a_short_memory_are_no_damage(tmp_path, monkeypatch, decoder, error, message):
    write_dicom(tmp_path, chest(), syntax=RLELossless)
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    monkeypatch.setattr(PixelReader, "_started", lambda _: subprocess.Popen(["sh", "-c", decoder], **pipes))
    with pytest.raises(error, match=message):
        values(tmp_path)
