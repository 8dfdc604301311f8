"""The registry of file formats: an entry is all that a format needs."""

import numpy as np
import pytest
from scan_files import SPACING, chest, write_dicom, write_nifti

from medctkit.scans import formats
from medctkit.scans.formats import Reader, register_reader
from medctkit.scans.geometry import straight_affine
from medctkit.scans.stored import Stored
from medctkit.scans.volumes import read_volume


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """The three that the package has, whatever other tests have added."""
    ours = ("DICOM series", "NRRD or MetaImage file", "NIfTI file")
    monkeypatch.setattr(formats, "READERS", {name: formats.READERS[name] for name in ours})


def read_npy(path, spacing):
    hu = np.load(path)
    if hu.dtype != np.int16:
        raise ValueError(f"values of type {hu.dtype}, expected int16; convert them")
    return Stored(hu.astype(np.float32), straight_affine(SPACING, "SAR"), ["a note"])


def test_a_format_can_be_added(tmp_path):
    np.save(tmp_path / "scan.npy", chest())
    with pytest.raises(
        ValueError, match="scan.npy: not a CT by its name; expected .nii, .nii.gz .NIfTI file.* folder, .zip"
    ):
        read_volume(tmp_path / "scan.npy")
    register_reader(Reader("NumPy array", (".npy",), read_npy))
    volume = read_volume(tmp_path / "scan.npy")
    np.testing.assert_array_equal(volume.hu, chest()[:, ::-1, ::-1])
    assert volume.provenance == ("read from NumPy array scan.npy", "a note", "turned from SAR to SPL")
    mended = read_volume(tmp_path / "scan.npy", spacing=(10, 9, 8), orientation="stored")
    assert mended.spacing == (10, 9, 8) and mended.orientation == "SAR"
    np.save(tmp_path / "scan.npy", chest().astype(float))
    with pytest.raises(ValueError, match="scan.npy: values of type float64, expected int16"):
        read_volume(tmp_path / "scan.npy")
    (tmp_path / "scan.png").touch()
    with pytest.raises(ValueError, match=r"scan.png: not a CT by its name; expected \.npy \(NumPy array\), \.nii"):
        read_volume(tmp_path / "scan.png")


def test_the_latest_reader_of_a_suffix_counts_and_a_name_is_there_once(tmp_path):
    path = write_nifti(tmp_path / "scan.nii", chest())

    def other(path, spacing):
        return Stored(chest().astype(np.float32), straight_affine(SPACING, "SPL"), [])

    for _ in range(2):  # as when a cell is run again
        register_reader(Reader("my NIfTI", (".nii",), other))
    assert list(formats.READERS)[-1] == "my NIfTI" and len(formats.READERS) == 4
    assert read_volume(path).provenance == ("read from my NIfTI scan.nii", "lies SPL already, nothing turned")


def test_a_format_may_be_a_folder_and_leaves_the_others_alone(tmp_path):
    def read(path, spacing, series):
        return Stored(np.load(path / f"{series}.npy").astype(np.float32), straight_affine(SPACING, "SPL"), [])

    register_reader(Reader("folder of arrays", (".arrays",), read, folders=True, choices=("series",)))
    (tmp_path / "scan.arrays").mkdir()
    np.save(tmp_path / "scan.arrays" / "late.npy", chest() - 5)
    np.testing.assert_array_equal(read_volume(tmp_path / "scan.arrays", series="late").hu, chest() - 5)
    series = write_dicom(tmp_path / "series", chest())
    np.testing.assert_array_equal(read_volume(series).hu, chest())
