"""The HU guard: what passes for a chest in HU, what does not, and what it advises."""

import tracemalloc
from functools import cache
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scan_files import chest, write_nifti

from medctkit.phantom.study import generate
from medctkit.scans.hounsfield import check_hu
from medctkit.scans.volumes import read_volume

SLOPES, INTERCEPTS = (0.5, 1, 2), (-8192, -1024, -1000, -512)


@cache
def phantom_hu(hospital="source", seed=0, shape=(32, 64, 64)):
    return generate(seed, hospital, shape=shape).volume.hu.astype(np.float32)


phantoms = st.builds(
    phantom_hu, st.sampled_from(["source", "target"]), st.integers(0, 2), st.sampled_from([(12, 24, 24), (32, 64, 64)])
)


def outside(hu, value):
    """The scan with `value` outside a reconstruction circle as wide as the picture."""
    rows, columns = (np.linspace(-1, 1, n) for n in hu.shape[1:])
    padded = hu.copy()
    padded[:, rows[:, None] ** 2 + columns**2 > 1] = value
    return padded


# --- the double-rescale trap


@settings(max_examples=25, deadline=None)
@given(phantoms, st.sampled_from(SLOPES), st.sampled_from(INTERCEPTS))
def test_rescaling_passes_once_and_is_refused_when_missing_or_repeated(hu, slope, intercept):
    stored = np.round((hu - intercept) / slope)
    check_hu(stored * slope + intercept, (slope, intercept))
    with pytest.raises(ValueError, match="^not in HU"):
        check_hu(stored)
    with pytest.raises(ValueError, match="^rescaled twice: the file is in HU already"):
        check_hu(hu * slope + intercept, (slope, intercept))
    with pytest.raises(ValueError, match="^not in HU"):  # and also where nobody says that it was rescaled
        check_hu(hu * slope + intercept)


def test_rescaling_real_scans_twice_is_refused_and_their_middle_passes(real_scan):
    hu = read_volume(real_scan).hu
    check_hu(hu[tuple(slice(n // 4, n - n // 4) for n in hu.shape)])
    for slope, intercept in product(SLOPES, INTERCEPTS):
        check_hu(np.round((hu - intercept) / slope) * slope + intercept, (slope, intercept))
        with pytest.raises(ValueError, match="^rescaled twice"):
            check_hu(hu * slope + intercept, (slope, intercept))
        with pytest.raises(ValueError, match="^not in HU"):
            check_hu((hu - intercept) / slope)


def test_version_2_with_the_metadata_of_version_1_stops_with_what_to_change(tmp_path):
    path = write_nifti(tmp_path / "v2.nii.gz", chest())
    read_volume(path)
    read_volume(path, rescale_slope=1, rescale_intercept=0)  # harmless
    expected = (
        r"v2.nii.gz: rescaled twice: the file is in HU already \(median 43; 0% of the voxels at or below -1000 HU, "
        r"which a model sees as -1\), and value \* 1 \+ -8192 spoils it \(median -8149; 100%\). Leave out "
        r"rescale_slope and rescale_intercept: in CT-RATE they are meant for version 1, not for version 2 "
        r"\(folders ending in _fixed\)"
    )
    with pytest.raises(ValueError, match=expected):
        read_volume(path, rescale_slope=1, rescale_intercept=-8192)


def test_a_slope_and_intercept_of_another_scan_are_refused_with_the_right_intercept(tmp_path):
    path = write_nifti(tmp_path / "v1.nii", chest() + 8192)
    with pytest.raises(ValueError, match="not in HU.*With a rescale_intercept of -8192 these values would be"):
        read_volume(path, rescale_intercept=-1024)


# --- nothing given


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda hu: hu * 0 + 40, "every voxel is 40: there is no picture in it"),
        (lambda hu: np.where(hu == hu.max(), hu, -1000), "all but 1 of 131072 voxels are -1000: there is next to no"),
        (lambda hu: hu + 1024, "stored or normalised.*of -1024 or -1000 these.*metadata say which it is"),
        (lambda hu: hu + 8192, "stored or normalised.*of -8192 these values would be plausible$"),
        (lambda hu: hu - 1024, "rescaled twice; leave out.*With 1024 added they would be plausible"),
        (lambda hu: hu - 8192, "HU lie in.*With 8192 added they would be plausible"),
        (lambda hu: (hu + 1024) / 4096, "stored or normalised values"),
        (lambda hu: (hu > -500) * 1, "stored or normalised values"),
        (lambda hu: np.clip(hu, -160, 240), "A chest has air"),
        (lambda hu: np.where(hu < -500, hu, -1000), "A chest has soft tissue"),
        (lambda hu: -hu, "A chest has air"),
        (lambda hu: hu * 1e6, r"HU lie in \(-8192, 32767\)"),
    ],
)
def test_values_that_are_not_hu_are_refused_with_what_would_do(change, message):
    with pytest.raises(ValueError, match=message):
        check_hu(change(phantom_hu()))


# --- what is rare, but legal


@pytest.mark.parametrize("value", [-1024, -2000, -3024, -8192])
def test_one_value_outside_the_reconstruction_circle_passes(value):
    padded = outside(phantom_hu(), value)
    assert (padded == value).mean() > 0.2
    check_hu(padded)
    check_hu(np.pad(padded, ((0, 0), (70, 70), (70, 70)), constant_values=value) if value < -1200 else padded)
    with pytest.raises(ValueError, match="rescaled twice" if value > -8192 else "HU lie in"):
        check_hu(padded - 1024)


def test_metal_contrast_medium_and_clipped_values_pass():
    hu = phantom_hu("target", 1).copy()
    check_hu(np.clip(hu, -1000, 1000))
    check_hu(np.clip(hu, -1024, 400))
    hu[10:14, 30:34, 30:34] = 30_000
    check_hu(hu)
    tissue = np.flatnonzero((hu > -200) & (hu < 200))
    hu.reshape(-1)[tissue[::3]] = 350  # a third of all tissue is bright blood
    check_hu(hu)


@pytest.mark.parametrize("hospital", ["source", "target"])
@pytest.mark.parametrize("shape", [(12, 24, 24), (32, 64, 64), (60, 120, 120)])
def test_phantoms_and_their_mediastinum_pass(hospital, shape):
    hu = phantom_hu(hospital, 3, shape)
    check_hu(hu)
    middle = tuple(slice(n // 3, n - n // 3) for n in shape)
    check_hu(hu[middle])


def test_the_guard_makes_no_copy_of_the_scan():
    hu = np.tile(phantom_hu(), (1, 8, 20))  # 21 million voxels, 84 MB
    tracemalloc.start()
    try:
        check_hu(hu)
        with pytest.raises(ValueError, match="rescaled twice"):
            check_hu(hu - np.float32(1024), (1, -1024))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < hu.nbytes + 60e6, "more than the shifted scan of this test and the sample"
