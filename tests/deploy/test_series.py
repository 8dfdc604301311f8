"""A volume written as a CT series is the same volume when it is read."""

import numpy as np
import pytest
import torch
from dicom_peers import phantom
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from medctkit.deploy.series import write_series
from medctkit.scans.preprocessing import PreprocessConfig, preprocess
from medctkit.scans.volumes import CTVolume, read_volume


@pytest.mark.parametrize("orientation", ["SPL", "IPL", "SAR", "PSL"])
def test_every_orientation_comes_back(tmp_path, orientation):
    volume = phantom().reoriented(orientation)
    back = read_volume(write_series(volume, tmp_path / "series"), orientation=orientation)
    assert np.array_equal(back.hu, volume.hu)
    assert np.allclose(back.affine, volume.affine, atol=1e-6)


@given(angles=st.tuples(*[st.floats(-30, 30)] * 3), origin=st.tuples(*[st.floats(-900, 900)] * 3))
@settings(max_examples=10)
def test_oblique_scans_come_back_in_their_place(tmp_path_factory, angles, origin):
    straight = phantom()
    affine = straight.affine.copy()
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ affine[:3, :3]
    affine[:3, 3] = origin
    volume = CTVolume(straight.hu, straight.spacing, "SPL", affine)
    back = read_volume(write_series(volume, tmp_path_factory.mktemp("series")), orientation="SPL")
    assert np.array_equal(back.hu, volume.hu)
    assert np.allclose(back.affine, affine, atol=1e-3)


@pytest.mark.parametrize("steps", [(10 / 3, 15 / 7, 15 / 7), (40 / 3, 45 / 8, 45 / 8), (5, 11.25, 11.25)])
def test_the_model_sees_the_same_scan(tmp_path, steps):
    """Where a scan ends between two of the model's voxels, the last digit of its spacing would take one more."""
    volume = CTVolume(phantom().hu, steps, "SPL")
    back = read_volume(write_series(volume, tmp_path / "series"), orientation="SPL")
    assert back.spacing == volume.spacing
    config = PreprocessConfig(shape=(64, 96, 96), spacing=(5, 3.75, 3.75))
    assert torch.equal(preprocess(back, config), preprocess(volume, config))


def test_values_beyond_16_bits_are_refused(tmp_path):
    with pytest.raises(ValueError, match="40000"):
        write_series(CTVolume(np.full((2, 2, 2), 40000), (1, 1, 1)), tmp_path)
