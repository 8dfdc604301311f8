"""Zip archives of scans: what is unpacked, and what is refused before anything is written."""

import io
import stat
import struct
import tempfile
import zipfile
from collections import namedtuple

import numpy as np
import pytest
from scan_files import chest, truncate, write_dicom

from medctkit.scans import archives, limits
from medctkit.scans.archives import unpacked
from medctkit.scans.volumes import read_volume


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """The folder for temporary files; whatever a test does, nothing may be left in it."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert not list(folder.iterdir())


def write_zip(path, members, compression=zipfile.ZIP_DEFLATED):
    """`members`: name or ZipInfo -> bytes, as pairs or as a dict."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, contents in members.items() if isinstance(members, dict) else members:
            info = name if isinstance(name, zipfile.ZipInfo) else zipfile.ZipInfo(name)
            info.compress_type = compression
            archive.writestr(info, contents)
    return path


def special(name, mode):
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, mode << 16
    return info


def refused(path, message, error=ValueError):
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(error, match=message), unpacked(path):
        raise AssertionError("must not be unpacked")
    assert sorted(path.parent.rglob("*")) == before


# --- what is unpacked ------------------------------------------------------------------------------------


MACOS_AND_WINDOWS = ["__MACOSX/scan/._1.dcm", "scan/.DS_Store", "scan/._1.dcm", "scan/Thumbs.db", "scan/__MACOSX/2"]


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        (
            {"patient/scan/1": b"one" * 5000, "patient/2.dcm": b"", "patient/empty/": b"", "./3": b"three"},
            {"patient/scan/1": b"one" * 5000, "patient/2.dcm": b"", "3": b"three"},
        ),
        (dict.fromkeys(["scan/1.dcm", *MACOS_AND_WINDOWS], b"x"), {"scan/1.dcm": b"x"}),
        ({"scan\\": b"", "scan\\1.dcm": b"x"}, {"scan/1.dcm": b"x"}),
        ({"a.zip": b"PK", "1.dcm": b"x"}, {"a.zip": b"PK", "1.dcm": b"x"}),
    ],
    ids=["folders", "what macOS and Windows add", "backslashes", "an archive beside other files"],
)
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_files_and_folders_come_out_and_vanish_after_the_block(tmp_path, compression, members, expected):
    with unpacked(write_zip(tmp_path / "scan.zip", members, compression)) as folder:
        assert {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()} == expected
    assert not folder.exists()


def test_a_zipped_series_is_the_series(tmp_path):
    series = write_dicom(tmp_path / "a" / "series", chest(), series="1.2.3")
    write_dicom(tmp_path / "a" / "other", chest() - 5, series="1.2.4")
    write_dicom(tmp_path / "a" / "scout", chest()[:1], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    files = {f"CD/{f.parent.name}/{f.name}": f.read_bytes() for f in (tmp_path / "a").rglob("*.dcm")}
    path = write_zip(tmp_path / "scan.ZIP", files)
    volume, expected = read_volume(path, series="1.2.3"), read_volume(series)
    np.testing.assert_array_equal(volume.hu, expected.hu)
    assert volume.spacing == expected.spacing and volume.provenance[0] == "read from DICOM series scan.ZIP"
    assert "left out: localizer (1)" in volume.provenance
    np.testing.assert_array_equal(read_volume(path, series="1.2.4").hu, chest() - 5)
    with pytest.raises(ValueError, match="scan.ZIP: 2 series in it"):
        read_volume(path)


def test_errors_in_a_zipped_series_name_archive_and_member(tmp_path):
    series = write_dicom(tmp_path / "series", chest())
    truncate(series / "003.dcm")
    path = write_zip(tmp_path / "scan.zip", {f"CD/{f.name}": f.read_bytes() for f in series.iterdir()})
    with pytest.raises(ValueError, match="scan.zip: CD/003.dcm.*damaged"):
        read_volume(path)


# --- what is refused -------------------------------------------------------------------------------------


HAS_ONE_NAME = "have one name; pack the scan again"


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["../evil.dcm"], "member '../evil.dcm' leads out of its folder with '..'"),
        (["..\\evil.dcm"], r"member '..\\\\evil.dcm' leads out of its folder"),
        (
            ["/etc/evil.dcm"],
            "member '/etc/evil.dcm' has an absolute path; an archive may write into its own folder only",
        ),
        (["\\\\server\\share\\evil.dcm"], "has an absolute path"),
        (["C:\\evil.dcm"], "has an absolute path"),
        (["a/" + "x" * 201], "has a name of more than 200 bytes; shorten it"),
        (
            [special("evil", stat.S_IFLNK | 0o777)],
            "member 'evil' is a link, device or pipe, not a file; pack the files",
        ),
        ([special("evil", stat.S_IFIFO | 0o777)], "member 'evil' is a link, device or pipe"),
        (["a/1", "a/1"], HAS_ONE_NAME),
        (["a/1", "A/1"], HAS_ONE_NAME),
        (["a/1", "a\\1"], HAS_ONE_NAME),
        (["a/1", "a//./1"], HAS_ONE_NAME),
        (["é", "e\u0301"], HAS_ONE_NAME),
        (["a/b", "a"], "member 'a' is a file and the folder of 'a/b'"),
    ],
)
def test_names_that_no_archive_of_a_scan_has_are_refused(tmp_path, names, message):
    refused(write_zip(tmp_path / "scan.zip", [(name, b"x") for name in ("1.dcm", *names)]), message)


def patched(path, at, code, value):
    """Let both headers of the only member say something else; `at`: where in its central header and its own."""
    data = bytearray(path.read_bytes())
    for start, offset in zip((b"PK\1\2", b"PK\3\4"), at, strict=True):
        struct.pack_into(code, data, data.index(start) + offset, value)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("at", "code", "value", "message"),
    [
        ((8, 6), "<H", 1, "member '1.dcm' is encrypted; unpack it with its password and give the folder"),
        ((10, 8), "<H", 97, "member '1.dcm' can't be read .*pack again as plain .zip"),
        ((47, 31), "<B", 0, "has no proper name|is damaged"),  # in its name
        ((24, 22), "<I", 10, "member '1.dcm' is damaged"),
        ((24, 22), "<I", 2_999_999, "member '1.dcm' is damaged"),
        ((24, 22), "<I", 3_000_001, "member '1.dcm' has 3000000, not 3000001 bytes; get the file again"),
    ],
    ids=["encrypted", "unknown method", "null byte", "much larger", "larger", "smaller"],
)
def test_members_that_are_not_what_they_say_are_refused(tmp_path, at, code, value, message):
    path = write_zip(tmp_path / "scan.zip", {"1.dcm": b"x" * 3_000_000})
    refused(patched(path, at, code, value), message)


def test_too_much_is_refused(tmp_path, monkeypatch):
    assert limits.RATIO_FROM == 256 << 20 and limits.MOST_RATIO == 100
    assert archives.MOST_BYTES == 8 << 30 and archives.MOST_MEMBERS == 100_000
    monkeypatch.setattr(archives, "MOST_MEMBERS", 10)
    path = write_zip(tmp_path / "many.zip", {str(n): b"" for n in range(11)})
    refused(path, "the archive has 11 members, at most 10 are unpacked; pack one scan")
    monkeypatch.setattr(limits, "RATIO_FROM", 1 << 20)
    path = write_zip(tmp_path / "bomb.zip", {"1": bytes(2 << 20)})
    refused(
        path, r"the archive's \d{4} bytes unpack to 2097152, those of a scan to 1048576 at most; pack one scan alone"
    )
    monkeypatch.setattr(archives, "MOST_BYTES", 2999)
    path = write_zip(tmp_path / "large.zip", {"1": b"x" * 3000}, zipfile.ZIP_STORED)
    refused(path, r"the archive's \d+ bytes unpack to 3000, those of a scan to 2999 at most")


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda _: usage(1 << 40, 1 << 40, 10 << 20))
    path = write_zip(tmp_path / "scan.zip", {"1": b"x" * 3000})
    refused(
        path, r"scan.zip: unpacks to 0 MiB, but .*temporary has 10 MiB left; free some room, or set TMPDIR", OSError
    )


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", r"the zip archive is truncated or damaged \(0 bytes here\); get the file again"),
        (b"Rar!\x1a\x07", "not a zip archive in spite of its name, it starts with .*; unpack it and give the folder"),
        (b"PK\3\4" + b"\0" * 100, r"the zip archive is truncated or damaged \(104 bytes here\); get the file again"),
    ],
)
def test_what_is_no_zip_archive_is_called_by_its_name(tmp_path, contents, message):
    path = tmp_path / "scan.zip"
    path.write_bytes(contents)
    refused(path, message)
    with pytest.raises(ValueError, match="scan.zip: " + message):
        read_volume(path)


@pytest.mark.parametrize("share", [0.3, 0.7, 0.99])
def test_a_truncated_archive_is_refused(tmp_path, share):
    path = write_zip(tmp_path / "scan.zip", {f"{n}.dcm": np.random.default_rng(n).bytes(2000) for n in range(5)})
    refused(truncate(path, share), "the zip archive is truncated or damaged")


def test_a_wrong_checksum_is_noticed(tmp_path):
    path = write_zip(tmp_path / "scan.zip", {"1.dcm": b"0123456789"}, zipfile.ZIP_STORED)
    path.write_bytes(path.read_bytes().replace(b"0123456789", b"0123456788"))
    refused(path, "member '1.dcm' is damaged; get the file again .Bad CRC-32")


def test_archives_of_archives_and_of_nothing_are_refused(tmp_path):
    inner = io.BytesIO()
    write_zip(inner, {"1.dcm": b"x"})
    path = write_zip(tmp_path / "scan.zip", {"CD/a.zip": inner.getvalue(), "CD/b.TAR": b"", ".DS_Store": b""})
    refused(path, r"holds only 2 archive\(s\), such as 'CD/a.zip'; give the one inside")
    refused(write_zip(tmp_path / "empty.zip", {"CD/": b"", "CD/.DS_Store": b"x"}), "the zip archive holds no files")
    with pytest.raises(FileNotFoundError, match="gone.zip"), unpacked(tmp_path / "gone.zip"):
        pass
