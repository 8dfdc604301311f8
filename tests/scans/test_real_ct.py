"""Real CT scans of four formats through reader and pre-processing."""

import numpy as np
import pytest
import torch
from scan_files import MINI

from medctkit.model.base_model import load_mini_base
from medctkit.scans.preprocessing import preprocess
from medctkit.scans.volumes import read_volume
from medctkit.viewers import SliceViewer
from medctkit.zero_shot.classifier import ZeroShotClassifier


def bone(hu):
    """Share of bone (above 200 HU) along each axis, normalised."""
    mask = hu > 200
    return [mask.sum(axis=tuple({0, 1, 2} - {axis})) / mask.sum() for axis in range(3)]


@pytest.fixture(scope="module")
def thorax(real_ct):
    return read_volume(real_ct / "cip_ct64" / "dicom")


@pytest.fixture(scope="module")
def volume(real_scan):
    """One real scan after the other, read once for all tests."""
    return read_volume(real_scan)


@pytest.fixture(scope="module")
def mini():
    return load_mini_base()


def test_dicom_and_nrrd_of_one_scan_are_identical(thorax, real_ct):
    nrrd = read_volume(real_ct / "cip_ct64" / "ct-64.nrrd")
    assert thorax.hu.dtype == nrrd.hu.dtype == np.float32
    np.testing.assert_array_equal(thorax.hu, nrrd.hu)
    assert thorax.orientation == nrrd.orientation == "SPL"
    np.testing.assert_allclose(thorax.spacing, nrrd.spacing, atol=1e-4)
    np.testing.assert_allclose(thorax.affine, nrrd.affine, atol=2e-3)


def test_the_thorax_is_what_its_index_says(thorax):
    assert thorax.shape == (79, 64, 64)
    assert thorax.spacing == pytest.approx((3.9873, 4.1719, 4.1719), abs=1e-4)
    assert (thorax.hu.min(), thorax.hu.max()) == (-1007, 1095)


def test_slices_run_from_liver_to_lung_apex(thorax):
    middle = thorax.hu[:, 16:48, 12:52]
    lung = ((middle < -600) & (middle > -1000)).mean(axis=(1, 2))
    assert lung[5] < 0.1 < 0.3 < lung[40]  # upper abdomen at the bottom, lungs in the middle


def test_rows_run_from_sternum_to_spine(thorax):
    rows = bone(thorax.hu[10:60])[1]
    assert rows[:20].sum() < 0.25 < 0.5 < rows[32:].sum()


def test_columns_run_from_the_right_to_the_left_of_the_patient(thorax):
    # the liver, under the right dome of the diaphragm, is solid; on the left lie stomach and spleen under the lung
    slices = thorax.hu[12:17, 16:48]
    soft = ((slices > 0) & (slices < 200)).mean(axis=(0, 1))
    assert soft[8:30].mean() > 1.2 * soft[34:56].mean()
    # and the heart points to the left
    heart = ((thorax.hu[28:36, 10:34] > 0) & (thorax.hu[28:36, 10:34] < 250)).sum(axis=(0, 1))
    columns = np.arange(64)[14:50]
    assert (columns * heart[14:50]).sum() / heart[14:50].sum() > 32


def test_every_real_scan_becomes_input_of_a_small_model(volume):
    assert volume.hu.dtype == np.float32 and volume.provenance
    seen = preprocess(volume, MINI)
    assert seen.shape == (1, *MINI.shape) and seen.dtype == torch.float32
    assert -1 <= seen.min() and seen.max() <= 1
    inside = seen[seen > -1]
    assert len(inside) > 0.02 * seen.numel() and inside.std() > 0.2
    # averaging over coarse voxels keeps the mean of what the model sees
    whole = np.clip(volume.hu, -1000, 1000).mean() / 1000
    share = np.prod([min(n * step, 360) for n, step in zip(volume.shape, volume.spacing, strict=True)]) / 360**3
    assert float(seen.mean()) == pytest.approx(share * whole - (1 - share), abs=0.08)


def test_nifti_is_turned_and_keeps_the_stored_orientation_when_asked(real_ct):
    path = real_ct / "totalseg_example" / "example_ct.nii.gz"
    volume, turned = read_volume(path, orientation="stored"), read_volume(path)
    assert volume.orientation == "SAR"
    np.testing.assert_array_equal(turned.hu, volume.hu[:, ::-1, ::-1])
    rows = bone(turned.hu[60:])[1]  # lumbar spine
    assert rows[len(rows) // 2 :].sum() > 0.6


def test_released_size(thorax):
    seen = preprocess(thorax)
    assert seen.shape == (1, 240, 480, 480)
    # 315 x 267 x 267 mm in a field of view of 360 mm: 209 slices (of 240) and 355 rows and columns (of 480)
    assert (seen[0, :15] == -1).all() and (seen[0, -16:] == -1).all()
    assert (seen[0, :, :62] == -1).all() and (seen[0, :, -62:] == -1).all()
    filled = seen[0, 15:-16, 62:-62, 62:-62]
    assert float(filled.mean()) == pytest.approx(np.clip(thorax.hu, -1000, 1000).mean() / 1000, abs=0.01)


def test_a_real_scan_goes_through_mini_model_and_viewer(volume, mini):
    pixels = preprocess(volume, mini.preprocess_config)
    scores = ZeroShotClassifier(mini.model, mini.tokenizer).scores(pixels[None])
    # the mini model knows phantoms only: that it answers is all there is to check
    assert scores.shape == (1, 18) and ((scores >= 0) & (scores <= 1)).all()
    viewer = SliceViewer(volume)
    for slider in viewer.sliders.values():
        before = viewer.canvas.widget.value
        slider.value += 1
        assert viewer.canvas.widget.value != before
    assert viewer.messages.text == ""


def test_every_real_scan_comes_out_canonical(volume, real_scan):
    assert volume.orientation == "SPL"
    np.testing.assert_array_equal(volume.hu, read_volume(real_scan, orientation="stored").reoriented().hu)
    # the table and the air under it lie behind the patient: rows run from front to back
    spine = bone(volume.hu)[1]
    assert (np.arange(len(spine)) * spine).sum() > 0.45 * len(spine)
