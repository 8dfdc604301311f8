"""Malformed NIfTI, NRRD and MetaImage files: each refused with a message that says what to do, nothing touched.

What a data manager reads is pinned: the value and the way out, with anything for `...`. DICOM has its own tests.
"""

import gzip
import hashlib
import os
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from headers import dim, mha, mhd, nhdr, nifti, nrrd, pixdim, saved
from scan_files import SHAPE, chest, truncate, write_itk, write_nifti

from medctkit.scans.volumes import read_volume

DAMAGED = "can't be read: truncated or damaged; get the file again"
BYTES = 2 * int(np.prod(SHAPE))


def voxels(values):
    return lambda folder: write_nifti(folder / "scan.nii.gz", values)


def raw(name, data):
    def write(folder):
        (folder / name).write_bytes(data)
        return folder / name

    return write


def flipped(write, back):
    """The file with one bit flipped, `back` bytes before its end."""

    def flip(folder):
        path = write(folder)
        data = bytearray(path.read_bytes())
        data[-back] ^= 0x10
        path.write_bytes(data)
        return path

    return flip


def shorter(write, share):
    return lambda folder: truncate(write(folder), share)


def without(write, suffix):
    def remove(folder):
        path = write(folder)
        (folder / (path.stem + suffix)).unlink()
        return path

    return remove


def several_volumes(folder):
    sitk.WriteImage(sitk.Image([4, 4, 4, 2], sitk.sitkInt16), str(folder / "scan.nrrd"))
    return folder / "scan.nrrd"


def noisy(shape):
    """Voxels that gzip can't make much smaller."""
    return np.random.default_rng(0).integers(-1000, 100, shape).astype(np.int16)


NAN = float("nan")
ORIGIN = "Offset = 0 0 0\nCenterOfRotation = 0 0 0\n"
OUTSIDE = "outside its folder; put both files into one folder"
HALF_NAN = np.where(np.arange(960).reshape(SHAPE) >= 955, np.nan, chest().astype(np.float32))

KINDS = ("nii", "nii.gz", "nrrd", "mha", "zip")

BAD_NIFTI = [
    (raw("scan.nii", b""), f"{DAMAGED} (it is empty)"),
    (raw("scan.nii.gz", b""), f"{DAMAGED} (it is empty)"),
    (raw("scan.nii", b"Dear colleague, " * 50), f"{DAMAGED}...starts with b'Dear')"),
    (raw("scan.nii.gz", b"Dear"), "not a compressed file, in spite of its name; it starts with b'Dear'"),
    *((raw(f"scan.{kind}", b"\n<!DOCTYPE html>"), "a web page: its download") for kind in KINDS),
    *((raw(f"scan.{kind}", b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull") for kind in KINDS),
    (
        lambda folder: write_nifti(folder / "scan.nii", chest()).rename(folder / "scan.nii.gz"),
        "not compressed, in spite of its name; rename it to .nii",
    ),
    (
        lambda folder: write_nifti(folder / "scan.nii.gz", chest()).rename(folder / "scan.nii"),
        "compressed, in spite of its name; rename it to .nii.gz",
    ),
    (raw("scan.nii.gz", gzip.compress(gzip.compress(b"x"))), "starts with"),
    (shorter(nifti(), 0.1), f"{DAMAGED} (its header ends after 227 of 348 bytes)"),
    (shorter(nifti(), 0.9), f"(its header describes {BYTES} bytes of voxels, and the file holds"),
    (shorter(voxels(noisy(SHAPE)), 0.9), f"{DAMAGED} (Compressed file ended before"),
    (flipped(voxels(noisy(SHAPE)), 700), DAMAGED),
    (flipped(voxels(noisy(SHAPE)), 6), f"{DAMAGED} (CRC check failed"),
    (nifti(magic=b"n+7"), "(its mark is b'n+7\\x00')"),
    (nifti(magic=b""), "an Analyze file or a damaged NIfTI header (its mark is"),
    (nifti(magic=b"ni1"), "the header of a NIfTI pair (.hdr with .img), without voxels; save"),
    (raw("scan.hdr", b"\0" * 348), "half of an Analyze or NIfTI pair (.hdr with .img); save"),
    (raw("scan.img", b"\0" * 348), "half of an Analyze or NIfTI pair"),
    (nifti(dim=0), f"{DAMAGED} (its header claims (0,) voxels)"),
    (nifti(dim=dim(10, -12, 8)), "(its header claims (10, -12, 8) voxels)"),
    (nifti(dim=dim(32767, 32767, 32767)), "1.31e+05 GiB: more than any CT"),
    (nifti(dim=dim(1000, 1000, 1000)), f"2000000000 bytes...holds {BYTES})"),
    (nifti(dim=dim(10, 12, 7)), f"{BYTES - 240} bytes...holds {BYTES})"),
    (nifti("scan.nii.gz", dim=dim(1000, 1000, 1000)), "2000000000 bytes of voxels in...of a CT at most"),
    (nifti("scan.nii.gz", dim=dim(10, 12, 9)), f"{BYTES + 240} bytes...holds {BYTES})"),
    (nifti("scan.nii.gz", dim=dim(10, 12, 7)), f"{BYTES - 240} bytes...holds {BYTES})"),
    (nifti(datatype=77), f"{DAMAGED}...the type of voxel 77, which does not exist)"),
    (saved(np.zeros((10, 12, 8), np.complex64)), "voxels of type complex64 (colour or complex)"),
    (saved(np.zeros((10, 12, 8), [("R", "u1"), ("G", "u1"), ("B", "u1")])), "(colour or complex): not a CT"),
    (nifti(vox_offset=1e6), f"{BYTES} bytes...holds 0"),
    (nifti(vox_offset=NAN), f"{DAMAGED} (by its header voxels start at byte nan, inside of the header"),
    (nifti(vox_offset=348), "voxels start at byte 348.0, inside of the header"),  # read there, all would be 2 off
    (nifti("scan.nii.gz", vox_offset=0), "voxels start at byte 0.0, inside of the header"),
    (nifti(scl_slope=np.inf), f"{DAMAGED} (its header scales voxels with scl_slope inf"),
    (nifti(scl_slope=1, scl_inter=NAN), "scl_slope 1.0, scl_inter nan"),
    (nifti(scl_slope=3e38, scl_inter=0), "voxels have NaN or infinite values"),
    (nifti(pixdim=pixdim(7.7, 8, 0)), "the size of a voxel in its header is (0.0, 8.0, 7.69"),
    (nifti(pixdim=pixdim(-7.7, 8, 12.5)), "expected lengths above 0; pass the right one as"),
    (nifti(pixdim=pixdim(NAN, 8, 12.5)), "(12.5, 8.0, nan) (slices, rows, columns)"),
    (
        nifti(pixdim=pixdim(1, 8, 12.5)),
        "the header contradicts itself: pixdim (12.5, 8.0, 1.0) mm, affine (12.5, 8.0, 7.7) mm",
    ),
    (nifti(qform_code=0, sform_code=0, pixdim=pixdim(1, 1, 1)), "blank header...pass spacing=(d, h, w) in mm"),
    (
        nifti(xyzt_units=1),
        "spacing (12500.0, 8000.0, 7699.999809) mm...pass the right one as spacing=(d, h, w)...metres, turned into mm)",
    ),
    (nifti(xyzt_units=5), "(its header has the unit of length 5, which does not exist)"),
    (nifti(srow_x=[NAN, 0, 0, 0]), "the affine in the header is unusable"),
    (nifti(srow_x=[0, 0, 0, 0], srow_y=[7.7, 8, 0, 0]), "the affine...unusable...: [["),
    (
        nifti(srow_y=[0, -8, 4, 0], srow_z=[0, 0, 11.84, 0]),
        "the axes in the header are 18.7 degrees away from a right angle...Let dcm2niix make a straight file",
    ),
    (nifti(sform_code=0, qform_code=1, quatern_b=1, quatern_c=1), "the qform in the header is unusable: w2"),
    (
        nifti(srow_x=[7.7, 0, 0, 0], qform_code=1),
        "by its sform the scan lies SPR, by its qform SPL...pass the right one as stored_as=",
    ),
    (saved(np.zeros((64, 64), np.int16)), "2-D, shape (64, 64): a CT volume has three axes"),
    (saved(np.zeros((4, 4, 4, 2), np.int16)), "4-D, shape (4, 4, 4, 2): a CT volume has three axes"),
    (
        saved(chest((90, 12, 10)).transpose(2, 1, 0), np.diag([20, 20, 20, 1])),
        '90 x 12 x 10 voxels of (20.0, 20.0, 20.0) mm...cover 1800 x 240 x 200 mm...or crop="chest"',
    ),
    (saved(chest().transpose(2, 1, 0), np.eye(4)), "cover 8 x 12 x 10 mm, a chest 40 to 700 mm"),
    (
        voxels(HALF_NAN),
        "5 of 960 voxels have NaN or infinite values, the first at slice 7, row 11, column 5...repair or drop this",
    ),
    (
        voxels(np.where(chest() == 91, np.inf, chest()).astype(np.float32)),
        "1 of 960 voxels have NaN or infinite values, the first at slice 7, row 11, column 9",
    ),
    (voxels(np.full(SHAPE, -1000, np.int16)), "every voxel is -1000: there is no picture"),
    (
        voxels(np.where(chest((16, 16, 16)) == 165, 5, -1000).astype(np.int16)),
        "all but 1 of 4096 voxels are -1000: there is next to no picture in it",
    ),
    (voxels(chest() + np.int16(1024)), "not in HU: values 124 to 1115, median 1067"),
]

BAD_ITK = [
    (raw("scan.nrrd", b""), f"{DAMAGED} (it is empty)"),
    (raw("scan.mha", b""), f"{DAMAGED} (it is empty)"),
    (raw("scan.nrrd", b"Dear colleague"), "no NRRD file; it starts with b'Dear'"),
    (raw("scan.mha", b"Dear colleague\n"), "has the line 'Dear colleag"),
    (shorter(nrrd(), 0.1), "(its header has no end"),
    (shorter(mha(), 0.1), "(its header has no end, or there are no"),
    (shorter(nrrd(), 0.9), f"describes {BYTES} bytes of voxels, and the file holds"),
    (shorter(mha(), 0.9), f"describes {BYTES} bytes of voxels, and the file"),
    (shorter(nrrd(compressed=True), 0.9), "compressed voxels end too early"),
    (shorter(mha(compressed=True), 0.9), "voxels end too early"),
    (flipped(nrrd(compressed=True), 7), f"{DAMAGED} (Error -3 while"),
    (flipped(mha(compressed=True), 2), f"{DAMAGED} (Error -3 while"),
    (mha("CompressedData = False", "CompressedData = True"), DAMAGED),
    (
        mha("CompressedDataSize = ", "CompressedDataSize = 6\nComment = ", compressed=True),
        "CompressedDataSize 6, and",
    ),
    (
        mhd("CompressedDataSize = ", "CompressedDataSize = 6\nComment = ", compressed=True),
        "CompressedDataSize 6, and",
    ),
    (mha("CompressedDataSize", "Comment", compressed=True), "CompressedDataSize 0, and its compressed voxels are"),
    (mha(" 12.5", " 12,5"), "has ElementSpacing 7.7...12,5, of which...; write points, or pass spacing=(d, h, w)"),
    (mha("Offset = 0 0 0", "Offset = 0,5 0 0"), "has Offset 0,5 0 0, of which...before a comma; write points"),
    (
        nrrd("space directions: (7.7000000000000002,0,0) (0,8,0) (0,0,12.5)\n", "spacings: 7,7 8 12,5\n"),
        "has spacings 7,7 8 12,5, of which...; write points, or pass",
    ),
    (nrrd("10 12 8", "99999 99999 99999"), "3.73e+06 GiB: more than any CT"),
    (nrrd("10 12 8", "1000 1000 1000"), f"2000000000 bytes...holds {BYTES})"),
    (mha("DimSize = 10 12 8", "DimSize = 1000 1000 1000"), f"2000000000 bytes...holds {BYTES})"),
    (nrrd("10 12 8", "10 12 7"), f"and the file holds {BYTES})"),
    (mha("DimSize = 10 12 8", "DimSize = 1000 1000 1000", compressed=True), "2000000000 bytes of voxels in"),
    (mha("DimSize = 10 12 8", "DimSize = 10 0 8"), "claims (10, 0, 8) voxels)"),
    (nrrd("10 12 8", "10 12"), "3-D, shape (10 12): a CT volume has three axes"),
    (mha("NDims = 3", "dimension = 3\nsizes = 10 12 8\nNDims = 99"), "99-D, shape (10 12 8): a CT volume has"),
    (mha("NDims = 3", "NDims = 99"), "99-D, shape (10 12 8): a CT volume has"),
    (mha("NDims = 3\n", "NDims = 4\n"), "4-D, shape (10 12 8): a CT volume has three axes"),
    (several_volumes, "4-D, shape (4 4 4 2): a CT volume has three axes; save the one to read"),
    (nrrd("type: short", "type: shirt"), DAMAGED),
    (mha("MET_SHORT", "MET_SHIRT"), DAMAGED),
    (mha("ElementType", "ElementNumberOfChannels = 3\nElementType"), "(colour or vectors): not a CT"),
    (nrrd("encoding: raw", "encoding: hex"), "the encoding 'hex'; save them as raw or"),
    (mha("BinaryData = True", "BinaryData = False"), "the encoding 'text'; save them as"),
    (without(nhdr(), ".raw"), "its voxels should be in 'scan.raw' beside it...copy both files"),
    (without(mhd(), ".raw"), "in 'scan.raw' beside it"),
    (nhdr("scan.raw", "../../secret.raw"), f"its voxels should be in '../../secret.raw', {OUTSIDE}"),
    (mhd("scan.raw", "/etc/hostname"), f"its voxels should be in '/etc/hostname', {OUTSIDE}"),
    (
        nhdr("data file: scan.raw", "data file: scan.raw\nData File: /etc/hostname"),
        "(its header has the line 'Data File: /etc/hostname' a second time)",
    ),
    (
        mhd("ElementDataFile = scan.raw", "elementdatafile = scan.raw\nElementDataFile : /etc/hostname"),
        "its voxels should be in '/etc/hostname', outside its folder",
    ),
    (mhd("= scan.raw", "= LIST"), "over several files ('LIST'); save the scan as one"),
    (nhdr("data file: scan.raw", "data file: LIST\n1.raw\n2.raw"), "over several files ('LIST'); save"),
    (mhd("= scan.raw", "= %03d.raw 1 8 1"), "over several files ('%03d"),
    (
        lambda folder: truncate(mhd()(folder).with_suffix(".raw")).with_suffix(".mhd"),
        f"{BYTES} bytes...holds {BYTES // 2})",
    ),
    (
        mha(f"TransformMatrix = 1 0 0 0 1 0 0 0 1\n{ORIGIN}AnatomicalOrientation = RAI", "AnatomicalOrientation = LPI"),
        "AnatomicalOrientation LPI without a TransformMatrix...pass how the scan lies as stored_as=",
    ),
    (mha("ElementSpacing", "Comment"), "blank header...pass spacing=(d, h, w) in mm"),
    (
        nrrd("space directions: (7.7000000000000002,0,0) (0,8,0) (0,0,12.5)\n", ""),
        "blank header...pass spacing=(d, h, w) in mm",
    ),
    (mha("ElementSpacing = 7", "ElementSpacing = -7"), "the size of a voxel in its header is (12.5, 8.0, -7.7)"),
    (mha("8 12.5\n", "nan 12.5\n"), "expected lengths above 0; pass the right one"),
    (mha("8 12.5\n", "8mm 12.5\n"), "expected lengths above 0; pass the right"),
    (
        nrrd("kinds:", 'space units: "um" "um" "um"\nkinds:'),
        "its header has lengths in ['um'], expected mm; pass spacing=(d, h, w) in mm",
    ),
    (nrrd("(0,8,0)", "(0,nan,0)"), DAMAGED),
    (nrrd("(0,8,0)", "(8,0,0)"), DAMAGED),
    (nrrd("(0,0,12.5)", "(0,4,12.5)"), "degrees away from a right angle"),
    (mha("1 0 0 0 1 0 0 0 1", "1 0 0 0 1 0 0 0.3 0.95"), "degrees away from a right"),
]


def contents(folder):
    """Every file below a folder, by its SHA-256."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def nothing_left(tmp_path, monkeypatch):
    """A folder for the scan; afterwards the folder for temporary files must be empty."""
    scans, temporary = tmp_path / "scans", tmp_path / "temporary"
    scans.mkdir()
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    yield scans
    assert not list(temporary.iterdir())


@pytest.mark.parametrize(("write", "message"), BAD_NIFTI + BAD_ITK)
def test_bad_files_are_refused_and_left_alone(nothing_left, write, message):
    path = write(nothing_left)
    before = contents(nothing_left)
    expected = re.escape(message).replace(re.escape("..."), ".*")
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: .*{expected}"):
        read_volume(path)
    assert contents(nothing_left) == before


# --- paths


def test_paths_that_lead_to_no_file(tmp_path):
    with pytest.raises(ValueError, match="the path of the scan is empty; give a file, or the folder of a DICOM series"):
        read_volume("")
    for name, target in {"loop.nii": "loop.nii", "gone.nii": "nothing"}.items():
        (tmp_path / name).symlink_to(tmp_path / target)
        with pytest.raises(FileNotFoundError, match=f"{name}: this link leads nowhere"):
            read_volume(tmp_path / name)
    for path in ("~no-such-user/scan.nii", tmp_path / "nowhere.nii.gz"):
        with pytest.raises(FileNotFoundError, match=f"{path}: there is no such file or folder"):
            read_volume(path)


def test_things_that_are_not_files(tmp_path):
    (tmp_path / "scan.nii.gz").mkdir()
    with pytest.raises(ValueError, match="scan.nii.gz: a folder, in spite of its name; give the file in it"):
        read_volume(tmp_path / "scan.nii.gz")
    os.mkfifo(tmp_path / "pipe.nii")  # opening it would wait for ever
    with pytest.raises(ValueError, match="pipe.nii: neither a file nor a folder"):
        read_volume(tmp_path / "pipe.nii")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read every file")
def test_files_that_may_not_be_read(tmp_path):
    path = write_nifti(tmp_path / "scan.nii", chest())
    path.chmod(0)
    with pytest.raises(PermissionError, match="scan.nii: no permission to read it; ask its owner"):
        read_volume(path)


@pytest.mark.parametrize("name", ["scan.nii", "scan.mha"])
def test_series_is_for_dicom_only(tmp_path, name):
    path = (write_nifti if name.endswith("nii") else write_itk)(tmp_path / name, chest())
    with pytest.raises(ValueError, match="series='1.2.3' chooses nothing: a .* file has "):
        read_volume(path, series="1.2.3")


@pytest.mark.parametrize(
    "arguments", [("1,0", None), (None, [1]), (None, "NaN"), (True, "x"), (0, 0), (-1, 0), (NAN, 0), (1, float("inf"))]
)
def test_impossible_slopes_and_intercepts(tmp_path, arguments):
    with pytest.raises(ValueError, match="scan.nii: rescale_slope=.*, rescale_intercept=.*: expected finite numbers"):
        read_volume(write_nifti(tmp_path / "scan.nii", chest()), *arguments)


@pytest.mark.parametrize("spacing", ["[0.34, 0.34]", 1.0, ("a", 1, 1), (0, 1, 1), (-1, 1, 1), (1, 1), (1, 1, NAN)])
def test_impossible_spacings(tmp_path, spacing):
    with pytest.raises(ValueError, match="scan.nii: spacing .*: expected three positive lengths in mm"):
        read_volume(write_nifti(tmp_path / "scan.nii", chest()), spacing=spacing)


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory by what /proc says")
def test_a_header_that_lies_allocates_nothing(tmp_path):
    """With room for 256 MiB more than is in use, headers that claim 2 to 4 GB are refused as usual."""
    import resource

    lies = [
        nifti(dim=dim(1000, 1000, 1000)),
        nifti("scan.nii.gz", dim=dim(1000, 1000, 1000)),
        *(nrrd("10 12 8", "1000 1000 1000", compressed=packed) for packed in (False, True)),
        *(mha("DimSize = 10 12 8", "DimSize = 1000 1000 1000", compressed=packed) for packed in (False, True)),
    ]
    read_volume(mha()(tmp_path))  # loads what is loaded on use
    read_volume(nifti("scan.nii.gz")(tmp_path))
    limits = resource.getrlimit(resource.RLIMIT_AS)
    for lie in lies:
        path = lie(tmp_path)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**28, limits[1]))
        try:
            with pytest.raises(ValueError, match="2000000000 bytes of voxels"):
                read_volume(path)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)
