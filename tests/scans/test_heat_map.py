"""A map keeps its own grid, and is right wherever it is asked."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medctkit.scans.heat_map import HeatMap
from medctkit.scans.volumes import CTVolume


@pytest.fixture(scope="module")
def ramp():
    """A volume whose value is its position towards the patient's front, so that linear interpolation is exact."""
    volume = CTVolume(np.zeros((6, 8, 10), np.float32), (5.0, 3.0, 2.0))
    rows = np.arange(8)[None, :, None] * np.ones((6, 1, 10))
    return volume, HeatMap.of_voxels(-3.0 * rows, volume, "towards the front")


@given(st.tuples(*(st.floats(0, n - 1) for n in (6, 8, 10))))
@settings(deadline=None)
def test_between_cells_it_is_linear(ramp, index):
    volume, heat = ramp
    point = volume.affine[:3, :3] @ index + volume.affine[:3, 3]
    assert heat.at(point) == pytest.approx(-3 * index[1], abs=1e-4)
    assert heat.at(point).shape == () and heat.at([[point]]).shape == (1, 1)


@pytest.mark.parametrize("orientation", ["SPL", "LAS", "AIL"])
def test_a_map_stays_with_the_patient_when_the_scan_is_turned(ramp, orientation):
    volume, heat = ramp
    turned = volume.reoriented(orientation)
    as_volume = CTVolume(heat.values, volume.spacing).reoriented(orientation)
    np.testing.assert_allclose(heat.on_voxels(turned), as_volume.hu, atol=1e-4)


def test_outside_of_its_grid_it_says_nothing(ramp):
    volume, heat = ramp
    half_a_cell_out = volume.affine[:3, 3] - volume.affine[:3, :3] @ [0.49, 0, 0]
    assert heat.at(half_a_cell_out) == heat.values[0, 0, 0]
    assert np.isnan(heat.at(volume.affine[:3, 3] - volume.affine[:3, :3] @ [0.51, 0, 0]))
    assert heat.limits == (-21.0, 0.0)


def test_bad_maps_are_refused(ramp):
    volume, _ = ramp
    with pytest.raises(ValueError, match=r"heat map 'x' has shape \(2, 2\); expected three axes"):
        HeatMap(np.zeros((2, 2)), np.eye(4), "x")
    with pytest.raises(ValueError, match="heat map 'x' has values that are not finite"):
        HeatMap(np.full((2, 2, 2), np.nan), np.eye(4), "x")
    with pytest.raises(ValueError, match="its affine must be an invertible 4 x 4 matrix"):
        HeatMap(np.zeros((2, 2, 2)), np.zeros((4, 4)), "x")
    with pytest.raises(ValueError, match=r"heat map 'x' has shape \(2, 2, 2\), the volume \(6, 8, 10\)"):
        HeatMap.of_voxels(np.zeros((2, 2, 2)), volume, "x")
