"""The real CT that comes with the package: whole, with its licence, and no business of the mini model."""

import sys

import numpy as np
import pytest

import medctkit
from medctkit.cohort import samples
from medctkit.viewers import SliceViewer


def test_the_scan_in_the_box_is_a_whole_thorax_in_hu_that_says_whose_it_is():
    volume = medctkit.sample_ct()
    assert volume.orientation == "SPL" and -1100 < volume.hu.min() < -900 < 300 < volume.hu.max()
    size = np.multiply(volume.shape, volume.spacing)
    assert (size > 250).all() and (size < 350).all()  # mm
    assert "Brigham and Women's Hospital" in volume.provenance[-1]
    licence = " ".join((samples.FILE.parent / "License.txt").read_text(encoding="utf-8").split())
    assert "have been obtained under license from The Brigham and Women's Hospital, Inc. and are subject to" in licence
    for part in ("PART B. DOWNLOADING AGREEMENT", "unchanged", "CLINICAL APPLICATIONS ARE NEITHER RECOMMENDED"):
        assert part in licence
    assert samples.FILE.stat().st_size < 500_000
    SliceViewer(volume)


def test_the_mini_model_refuses_it():
    with pytest.raises(ValueError, match="the mini model knows phantoms only"):
        medctkit.classify(medctkit.sample_ct())


def test_a_changed_file_another_name_and_a_missing_library_are_told(tmp_path, monkeypatch):
    changed = tmp_path / "ct-64.nrrd"
    changed.write_bytes(samples.FILE.read_bytes()[:-1] + b"x")
    monkeypatch.setattr(samples, "FILE", changed)
    with pytest.raises(ValueError, match="ct-64.nrrd is not the scan that came with the package"):
        medctkit.sample_ct()
    with pytest.raises(ValueError, match="which='large': expected small or idc"):
        medctkit.sample_ct("large")
    monkeypatch.setitem(sys.modules, "idc_index", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'medctkit\[open\]'"):
        medctkit.sample_ct("idc", tmp_path)
