"""Pre-processing: equal to the released pipeline, exact where nothing is to do, honest where voxels are coarse."""

import ast
import csv
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scan_files import MINI, orientations

from medctkit.phantom.study import generate
from medctkit.scans.preprocessing import PreprocessConfig, as_seen, model_affine, preprocess
from medctkit.scans.volumes import CTVolume, read_volume

GOLDEN = Path(__file__).parents[1] / "golden"


preprocess_any = partial(preprocess, check=False)  # noise and ramps are no chest


def scan(shape, spacing, seed=0, low=-1200, high=1200):
    hu = np.random.default_rng(seed).integers(low, high, shape).astype(np.float32)
    return CTVolume(hu, spacing)


def straightforward(volume, config):
    """The same by torch's own interpolation of the whole volume, then the crop."""
    values = torch.from_numpy(np.array(volume.hu, np.float32)).clamp(-1000, 1000).transpose(1, 2) / 1000
    spacing = [volume.spacing[axis] for axis in (0, 2, 1)]
    size = [int(n * s / t) for n, s, t in zip(values.shape, spacing, config.spacing, strict=True)]
    values = torch.nn.functional.interpolate(values[None, None], size, mode="trilinear", align_corners=False)[0]
    for axis, target in enumerate(config.shape, start=1):
        n = values.shape[axis]
        values = values.narrow(axis, max(n - target, 0) // 2, min(n, target))
        before = max(target - n, 0) // 2
        pad = [0, 0] * (3 - axis) + [before, max(target - n, 0) - before]
        values = torch.nn.functional.pad(values, pad, value=-1)
    return values


@pytest.mark.parametrize("name", ["prep_crop", "prep_pad"])
def test_equal_to_the_released_pipeline(name):
    (row,) = csv.DictReader((GOLDEN / f"{name}_meta.csv").read_text().splitlines())
    rows, columns = ast.literal_eval(row["XYSpacing"])
    spacing = (float(row["ZSpacing"]), rows, columns)
    volume = read_volume(
        GOLDEN / row["VolumeName"],
        float(row["RescaleSlope"]),
        float(row["RescaleIntercept"]),
        spacing,
        stored_as="SPL",  # as CT-RATE is read
    )
    model_input = preprocess(volume)
    assert model_input.shape == (1, 240, 480, 480) and model_input.dtype == torch.float32
    expected = np.loadtxt(GOLDEN / f"{name}_voxels.csv", delimiter=",", skiprows=1)
    z, y, x = expected[:, :3].astype(int).T
    np.testing.assert_allclose(model_input[0, z, y, x].numpy(), expected[:, 3], atol=1e-3, rtol=0)


lengths = st.integers(3, 24)
steps = st.floats(0.5, 5.0)


@settings(max_examples=25, deadline=None)
@given(st.tuples(lengths, lengths, lengths), st.tuples(steps, steps, steps), st.integers(0, 99))
def test_cropping_first_changes_nothing(shape, spacing, seed):
    volume, config = scan(shape, spacing, seed), PreprocessConfig((1.5, 0.75, 1.0), (12, 20, 9))
    if min(int(n * s / t) for n, s, t in zip(shape, spacing, (1.5, 1.0, 0.75), strict=True)) < 1:
        return
    torch.testing.assert_close(preprocess_any(volume, config), straightforward(volume, config), atol=1e-4, rtol=0)


@pytest.mark.parametrize("antialias", [False, True])
def test_nothing_to_resample_is_the_identity(antialias):
    config = PreprocessConfig(MINI.spacing, MINI.shape, antialias)
    volume = scan(MINI.shape, MINI.spacing)
    expected = torch.from_numpy(volume.hu).clamp(-1000, 1000).transpose(1, 2) / 1000
    assert torch.equal(preprocess_any(volume, config)[0], expected)


def test_rows_and_columns_change_places():
    hu = np.full((2, 3, 4), -1000, np.int16)
    hu[0, 1, 3] = 500  # z, y, x
    model_input = preprocess_any(CTVolume(hu, (1, 1, 1)), PreprocessConfig((1, 1, 1), (2, 4, 3)))
    assert model_input.shape == (1, 2, 4, 3)
    assert model_input[0, 0, 3, 1] == 0.5 and (model_input == -1).sum() == 23


def test_the_smaller_pad_comes_first_and_crops_start_at_half():
    hu = np.arange(1, 4, dtype=np.int16).reshape(3, 1, 1) * 100
    padded = preprocess_any(CTVolume(hu, (1, 1, 1)), PreprocessConfig((1, 1, 1), (6, 1, 1)))
    torch.testing.assert_close(padded.flatten(), torch.tensor([-1, 0.1, 0.2, 0.3, -1, -1]))
    cropped = preprocess_any(CTVolume(hu, (1, 1, 1)), PreprocessConfig((1, 1, 1), (2, 1, 1)))
    torch.testing.assert_close(cropped.flatten(), torch.tensor([0.1, 0.2]))


def test_the_volume_is_not_touched():
    volume = scan((6, 8, 8), MINI.spacing)
    before = volume.hu.copy()
    preprocess_any(volume, MINI)
    np.testing.assert_array_equal(volume.hu, before)


def test_antialiasing_averages_the_noise_of_fine_slices():
    """A factor 7.5 in every axis averages over some hundred voxels; linear interpolation over eight."""
    fine = scan((150, 75, 75), (1.5, 0.75, 0.75), low=-500, high=500)
    sharp = preprocess_any(fine, PreprocessConfig(MINI.spacing, (20, 10, 10)))
    smooth = preprocess_any(fine, PreprocessConfig(MINI.spacing, (20, 10, 10), antialias=True))
    assert sharp.std() > 5 * smooth.std()
    assert float(smooth.mean()) == pytest.approx(fine.hu.mean() / 1000, abs=0.005)


def test_antialiasing_moves_nothing():
    """A ramp stays the ramp it is, at the same place, away from the edges."""
    z = np.arange(150, dtype=np.float32)[:, None, None] * 10 - 745 + np.zeros((150, 2, 2), np.float32)
    target = PreprocessConfig((11.25, 1, 1), (20, 2, 2), antialias=True)
    centres = (np.arange(20) + 0.5) * 7.5 - 0.5
    got = preprocess_any(CTVolume(z, (1.5, 1, 1)), target)[0, :, 0, 0].numpy()
    np.testing.assert_allclose(got[1:-1], (centres[1:-1] * 10 - 745) / 1000, atol=1e-4)


def test_antialiasing_leaves_small_factors_alone():
    volume = scan((20, 30, 30), (8.0, 4.0, 4.0))  # a factor 1.41
    plain = PreprocessConfig(MINI.spacing, MINI.shape)
    assert torch.equal(preprocess_any(volume, MINI), preprocess_any(volume, plain))


@settings(max_examples=40, deadline=None)
@given(st.tuples(lengths, lengths, lengths), st.tuples(steps, steps, steps), orientations, st.integers(0, 2))
def test_every_voxel_of_the_model_lies_where_its_affine_says(shape, spacing, orientation, axis):
    """HU grow by 1 for each mm along a patient axis, so that a voxel's value is its place."""
    config = PreprocessConfig((1.5, 0.75, 1.0), (12, 20, 9))
    if min(int(n * s / t) for n, s, t in zip(shape, spacing, (1.5, 1.0, 0.75), strict=True)) < 1:
        return
    canonical = CTVolume(np.zeros(shape), spacing)
    place = np.stack([*np.indices(shape), np.ones(shape)], axis=-1) @ canonical.affine.T
    volume = CTVolume(place[..., axis].astype(np.float32), spacing).reoriented(orientation)
    expected = np.stack([*np.indices(config.shape), np.ones(config.shape)], axis=-1) @ model_affine(volume, config).T
    within = (expected @ np.linalg.inv(canonical.affine).T)[..., :3]
    reach = [max(1.0, n / max(int(n * s / t), 1)) for n, s, t in zip(shape, spacing, (1.5, 1.0, 0.75), strict=True)]
    inside = ((within >= np.array(reach) - 1) & (within <= np.array(shape) - reach)).all(-1)  # away from the edges
    seen = preprocess_any(volume, config)[0].numpy() * 1000
    np.testing.assert_allclose(seen[inside], expected[..., axis][inside], atol=2e-3)
    view = as_seen(volume, config)
    assert view.orientation == "SPL" and view.shape == (12, 9, 20)
    np.testing.assert_array_equal(view.hu.transpose(0, 2, 1), preprocess_any(volume, config)[0] * 1000)
    np.testing.assert_allclose(view.affine @ [1, 2, 3, 1], model_affine(volume, config) @ [1, 3, 2, 1])
    assert "resampled to what a model sees" in view.provenance[-1]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((240, 480, 480), PreprocessConfig()),
        ((32, 64, 64), MINI),
        ((120, 240, 480), PreprocessConfig((3.0, 1.5, 0.75), (120, 240, 480))),
    ],
)
def test_a_model_sees_the_released_field_of_view(shape, expected):
    config = PreprocessConfig.for_shape(shape)
    assert config == expected
    assert [n * step for n, step in zip(config.shape, config.spacing, strict=True)] == [360, 360, 360]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(spacing=(1.5, 0, 0.75)), r"spacing \(1.5, 0, 0.75\): expected three positive lengths in mm \(z, x, y\)"),
        (dict(spacing=(1.5, 0.75)), "expected three positive lengths"),
        (dict(shape=(240, 480, -1)), "shape=.*-1.*: expected three positive numbers"),
        (dict(shape=(240, 480, 1.5)), "expected three positive numbers"),
        (dict(hu_range=(100, -100)), r"hu_range=\(100, -100\): expected the lower end, then the higher"),
        (dict(axes="xyt"), "axes='xyt': expected z, y and x in some order"),
    ],
)
def test_impossible_configurations_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PreprocessConfig(**arguments)


@pytest.mark.parametrize("shift", [1024, -1024, np.nan])
def test_what_is_not_hu_never_reaches_a_model(shift):
    volume = generate(3, shape=MINI.shape).volume
    hu = volume.hu.astype(np.float32)
    arrays = CTVolume(hu, volume.spacing)
    assert torch.equal(preprocess(arrays, MINI), preprocess(volume, MINI))
    hu += shift  # also where the array was changed afterwards
    with pytest.raises(ValueError, match="not in HU|NaN or infinite"):
        preprocess(arrays, MINI)


def test_model_input_is_never_below_air():
    for n in range(100, 200, 7):
        hu = np.where(np.arange(n)[:, None, None] > n // 2, -1000, 40) * np.ones((1, 20, 20), np.float32)
        seen = preprocess(CTVolume(hu, (2.0, 12, 12)), MINI)
        assert -1 <= seen.min() and seen.max() <= 1


def test_a_bare_array_is_refused():
    with pytest.raises(TypeError, match=r"expected a CTVolume, as read_volume\(path\) gives it, got ndarray"):
        preprocess(np.zeros((4, 4, 4)))


def test_a_scan_thinner_than_one_voxel_is_refused():
    with pytest.raises(ValueError, match="covers 2 mm along axis 0 .* less than one voxel of the model"):
        preprocess_any(scan((2, 64, 64), (1, 5, 5)), MINI)


def test_another_model_may_want_other_axes_and_another_range():
    volume = generate(3, shape=(36, 40, 44)).volume
    usual = PreprocessConfig((10.0, 8.0, 6.0), (30, 40, 50))
    other = PreprocessConfig((6.0, 8.0, 10.0), (50, 40, 30), axes="yxz", hu_range=(-1000, 200))
    found, expected = preprocess_any(volume, other)[0], preprocess_any(volume, usual)[0].permute(2, 1, 0)
    assert found.shape == (50, 40, 30) and found.is_contiguous() and (found.min(), found.max()) == (-1, 1)
    within = (expected > -1) & (expected < 0.2)  # -1000 to 200 HU become -1 to 1
    calm = (found[within] - (expected[within] * 1000 + 400) / 600).abs() < 1e-3  # where no neighbour was clipped
    assert calm.float().mean() > 0.8
    seen, same = as_seen(volume, other), as_seen(volume, usual)
    np.testing.assert_allclose(seen.affine, same.affine)
    assert seen.shape == same.shape and seen.hu.max() == pytest.approx(200)


def test_axes_may_run_the_other_way():
    volume = generate(3, shape=(36, 40, 44)).volume
    usual = PreprocessConfig((10.0, 8.0, 6.0), (30, 40, 50), axes="zxy")
    ras = PreprocessConfig((8.0, 6.0, 10.0), (40, 50, 30), axes="XYz")
    found, expected = preprocess_any(volume, ras), preprocess_any(volume, usual)
    torch.testing.assert_close(found, expected.permute(0, 2, 3, 1).flip(1, 2), rtol=0, atol=0)
    affine = model_affine(volume, ras)
    assert (np.sign(affine[:3, :3]).round() == np.eye(3)).all()  # right, anterior, superior
    index = np.array([3, 5, 7, 1])
    z, x, y = 7, 39 - 3, 49 - 5
    np.testing.assert_allclose(affine @ index, model_affine(volume, usual) @ [z, x, y, 1])
    np.testing.assert_array_equal(as_seen(volume, ras).hu, as_seen(volume, usual).hu)
