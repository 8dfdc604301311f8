"""Damaged files of every format: a volume or a message that names the file, in little memory, and nothing else.

Seeded, and so the same each time as far as it gets in 20 seconds. MEDCTKIT_FUZZ_SECONDS asks for more.
"""

import itertools
import os
import shutil
import time
import tracemalloc

import numpy as np
import pytest
from scan_files import SYNTAXES, chest, enhanced, write_dicom, write_itk, write_nifti

from medctkit.scans.volumes import read_volume

SECONDS = float(os.environ.get("MEDCTKIT_FUZZ_SECONDS", 20))
SUFFIXES = (".nii", ".gz", ".nrrd", ".nhdr", ".mha", ".mhd", ".zip")
TELLING = np.array([0, 1, 0x7F, 0x80, 0xFE, 0xFF, *b"0123456789 -.\\\n:="], np.uint8)


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Sound scans of every format, each in a folder: what to read, and the files to damage."""
    root = tmp_path_factory.mktemp("sound")
    for name in ("a.nii", "a.nii.gz"):
        (root / name.replace(".", "_")).mkdir()
        write_nifti(root / name.replace(".", "_") / name, chest())
    for name, packed in (("a.nrrd", True), ("b.nrrd", False), ("a.nhdr", False), ("a.mha", True), ("a.mhd", False)):
        (root / name.replace(".", "_")).mkdir()
        write_itk(root / name.replace(".", "_") / name, chest(), compressed=packed)
    for syntax in SYNTAXES:
        write_dicom(root / syntax.keyword, chest((3, 16, 16)), step=(0, 0, 20), syntax=syntax)
    enhanced(sorted(write_dicom(root / "enhanced", chest((3, 16, 16)), step=(0, 0, 20)).iterdir()), root / "enhanced/a")
    (root / "zip").mkdir()
    shutil.make_archive(str(root / "zip" / "a"), "zip", root / "RLELossless")
    return sorted(root.iterdir())


def damaged(data, random):
    """Bytes changed, taken away, doubled or cut, most often in the header."""
    data = np.frombuffer(data, np.uint8).copy()
    within = len(data) if random.random() < 0.5 else min(len(data), 1200)
    at = random.integers(within)
    match random.integers(6):
        case 0:
            return data[: random.integers(len(data))].tobytes()
        case 1:
            return np.delete(data, slice(at, at + random.integers(1, 9))).tobytes()
        case 2:
            return np.insert(data, at, data[at : at + random.integers(1, 300)]).tobytes()
        case 3:
            data[at : at + 4] = random.choice(TELLING)
        case _:
            places = random.integers(within, size=random.integers(1, 12))
            data[places] = random.choice(TELLING, len(places))
    return data.tobytes()


@pytest.mark.slow
def test_a_damaged_scan_is_a_volume_or_a_message(scans, tmp_path):
    end, read = time.monotonic() + SECONDS, 0
    for n in itertools.count():
        random = np.random.default_rng(n)
        sound = scans[n % len(scans)]
        folder = shutil.copytree(sound, tmp_path / str(n))
        file = random.choice(sorted(folder.iterdir()))
        file.write_bytes(damaged(file.read_bytes(), random))
        path = next((f for f in sorted(folder.iterdir()) if f.suffix in SUFFIXES), folder)
        before, started = sorted(folder.rglob("*")), time.monotonic()
        tracemalloc.start()
        try:
            volume = read_volume(path)
            assert np.isfinite(volume.hu).all()
            read += 1
        except ValueError as error:
            assert str(path) in str(error), (n, sound, error)
        except Exception as error:
            raise AssertionError(f"case {n}, {sound.name}") from error
        finally:
            most = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert most < 100 << 20, f"case {n}, {sound.name}: {most} bytes"
        assert time.monotonic() - started < 30, f"case {n}, {sound.name}"
        assert sorted(folder.rglob("*")) == before
        shutil.rmtree(folder)
        if time.monotonic() > end:
            break
    assert n > len(scans) and 0 < read < n
