"""The same place in two scans."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from medctkit.scans.volumes import CTVolume
from medctkit.viewers.drawing.linked_scans import LinkedScans


def volume(shape=(20, 30, 40), spacing=(5.0, 2.0, 2.0), origin=None):
    """A volume in SPL; without an origin nobody says where the patient lay."""
    affine = None
    if origin is not None:
        affine = np.diag([-spacing[2], -spacing[1], spacing[0], 1.0])[:, [2, 1, 0, 3]]
        affine[:3, 3] = origin
    return CTVolume(np.zeros(shape, np.int16), spacing, affine=affine)


def test_one_scan_within_another_has_its_coordinates():
    whole, crop = volume((40, 50, 60), origin=(60, 40, -900)), volume((20, 50, 60), origin=(60, 40, -850))
    linked = LinkedScans(whole, other=crop)
    assert linked.how == "linked by patient coordinates" and not linked.offsets[1].any()
    assert linked.voxels((15, 6, 7)) == [(15, 6, 7), (5, 6, 7)]
    assert linked.in_first(1, (5, 6, 7)) == (15, 6, 7) and linked.in_first(0, (1, 2, 3)) == (1, 2, 3)
    assert linked.described((15, 6, 7)) == ["second scan: R 46 mm, A 28 mm, I 825 mm · 0 HU", linked.how]
    assert linked.described((2, 6, 7))[0] == "second scan: does not reach this place"
    assert linked.voxels((2, 6, 7))[1] == (0, 6, 7)  # the nearest that it has
    assert LinkedScans(crop, other=whole).how == linked.how


def test_two_patients_have_the_middle_in_common():
    linked = LinkedScans(volume(origin=(60, 40, -900)), other=volume(origin=(60, 40, 100)), names=("a", "b"))
    assert linked.how == "linked by the distance from the middle of each scan"
    np.testing.assert_allclose(linked.offsets[1], [0, 0, 1000])
    assert linked.voxels((3, 4, 5))[1] == (3, 4, 5)
    assert [scan.name for scan in linked.scans] == ["a", "b"]


def test_coordinates_that_nobody_measured_do_not_link_two_scans():
    linked = LinkedScans(volume(), other=volume(spacing=(4.0, 1.5, 1.5)))  # both begin at the origin, by default
    first, second = linked.scans
    assert not first.placed and not second.placed
    np.testing.assert_allclose(first.middle + linked.offsets[1], second.middle)
    assert np.abs(linked.offsets[1]).min() > 1 and "middle" in linked.how


@given(st.integers(0, 19), st.integers(0, 29), st.integers(0, 39), st.sampled_from(["SPL", "LPS", "IAR", "PRS"]))
def test_there_and_back_is_the_same_voxel(d, h, w, orientation):
    linked = LinkedScans(volume(), other=volume((100, 60, 80), (1.0, 1.0, 1.0), (-3, 8, 20)).reoriented(orientation))
    (_, there) = linked.voxels((d, h, w))
    assert linked.in_first(1, there) == (d, h, w)
