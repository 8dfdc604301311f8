"""Slices the way radiologists hang them, with masks and heat maps over them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from medctkit import viewers
from medctkit.phantom.study import generate
from medctkit.scans.heat_map import HeatMap
from medctkit.scans.volumes import CTVolume
from medctkit.viewers.drawing import rendering
from medctkit.viewers.drawing.rendering import Look, Scan

ORIENTATIONS = ["SPL", "IAR", "LPS", "PRS", "AIL"]


@pytest.fixture(scope="module")
def marked():
    """Air with one bright block at the patient's left, front and head."""
    hu = np.full((20, 30, 40), -1000, np.int16)
    hu[15:18, 3:7, 30:36] = 1000
    return CTVolume(hu, (5.0, 2.0, 2.0))


@pytest.fixture(scope="module")
def study():
    return generate(4, findings=["Pleural effusion", "Lung nodule"], shape=(32, 64, 64))


def bright(volume, plane, index):
    """Where the picture is bright, as (row, column) shares of its size."""
    grey = np.asarray(rendering.render(volume, plane, index, "bone", height=200)).astype(int)
    return np.argwhere(grey.min(axis=2) > 190).mean(axis=0) / grey.shape[:2]


def test_the_face_of_the_wing_says_what_it_hands_on():
    said = {name for name in viewers.__all__ if getattr(viewers, name) is not None and f"`{name}`" in viewers.__doc__}
    assert said >= {"SliceViewer", "TrainingPlot", "training_figure", "finding_gallery", "render"}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_every_orientation_is_hung_the_same_way(marked, orientation):
    shown = Scan.of(marked.reoriented(orientation)).volume
    row, column = bright(shown, "axial", 16)
    assert row < 0.3 and column > 0.7  # front up, patient's left on the right
    row, column = bright(shown, "coronal", 5)
    assert row < 0.3 and column > 0.7  # head up, patient's left on the right
    row, column = bright(shown, "sagittal", 33)
    assert row < 0.3 and column < 0.3  # head up, front on the left


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_masks_turn_with_their_volume_and_are_not_copied(marked, orientation):
    turned = marked.reoriented(orientation)
    mask = turned.hu > 0
    scan = Scan.of(turned, {"block": mask})
    np.testing.assert_array_equal(scan.masks["block"], scan.volume.hu > 0)
    assert np.shares_memory(scan.masks["block"], mask)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_voxel_keeps_its_place_in_the_patient(orientation):
    hu = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
    affine = np.array([[0, 0.1, -2, 30], [0, -3, -0.1, -7], [10, 0, 0, 90], [0, 0, 0, 1]])
    stored = CTVolume(hu, (10, np.hypot(3, 0.1), np.hypot(2, 0.1)), affine=affine).reoriented(orientation)
    scan = Scan.of(stored)
    for voxel in np.ndindex(scan.volume.shape):
        found = np.argwhere(stored.hu == scan.volume.hu[voxel])[0]
        place = scan.point_of(voxel)
        np.testing.assert_allclose(place, stored.affine[:3, :3] @ found + stored.affine[:3, 3])
        assert scan.nearest(scan.voxel_of(place + 0.4)) == voxel
    assert scan.nearest(scan.voxel_of([900, 900, 900])) == (3, 0, 0)  # head, front, right
    np.testing.assert_allclose(scan.middle, scan.point_of((1.5, 2, 2.5)))


def test_pixels_have_the_right_aspect_ratio_and_a_thin_slab_does_not_grow_without_end(marked):
    for plane, (tall, wide) in {"axial": (60, 80), "coronal": (100, 80), "sagittal": (100, 60)}.items():
        size = rendering.render(marked, plane, 5, height=300).size
        assert size[1] == 300 and abs(size[0] - 300 * wide / tall) <= 1
    slab = CTVolume(np.zeros((4, 100, 100), np.int16), (2.5, 1.0, 1.0))
    assert rendering.render(slab, "coronal", 5, height=300).size == (600, 60)


@given(st.floats(-2000, 3000), st.floats(-1000, 1000), st.floats(1, 4000))
def test_a_window_is_a_ramp_between_its_ends(hu, centre, width):
    assert rendering.window(hu, centre, width) == pytest.approx(min(max((hu - centre) / width + 0.5, 0), 1), abs=2e-3)
    ends = [centre - width, centre - width / 2, centre, centre + width / 2, 9999]
    np.testing.assert_allclose(rendering.window(ends, centre, width), [0, 0, 0.5, 1, 1], atol=2e-3)


def test_a_slab_shows_the_most_the_least_or_the_mean_through_it():
    hu = np.zeros((9, 12, 14), np.int16)
    hu[2, 3, 4] = 1000
    volume = CTVolume(hu, (2.0, 5.0, 5.0))
    found = {how: rendering.slab_of(volume, "axial", 4, how, 9.0)[3, 4] for how in rendering.SLABS}
    assert found == {"one slice": 0, "maximum": 1000, "minimum": 0, "mean": 200}  # of 5 slices
    assert rendering.slab_of(volume, "coronal", 5, "maximum", 20.0)[9 - 1 - 2, 4] == 1000  # head up


def test_soft_masks_are_kept_and_outlined_at_the_border(marked):
    mask = np.zeros(marked.shape)
    mask[10, :8] = 0.5
    picture = np.asarray(rendering.render(marked, "axial", 10, masks={"m": mask}, opacity=0.0, height=300))
    assert (picture[0, 20] == rendering.MASK_COLOURS[0]).all()
    assert (picture[40, 200] != rendering.MASK_COLOURS[0]).any()  # opacity 0: an outline only


def test_each_mask_has_a_colour_of_its_own_also_where_few_are_shown(marked):
    masks = {str(i): np.zeros(marked.shape, bool) for i in range(6)}
    for i, mask in enumerate(masks.values()):
        mask[:, :, 5 * i : 5 * i + 4] = True
    scan = Scan.of(marked, masks)
    picture = np.asarray(rendering.draw_slice(scan, "axial", 0, (400, 300), Look(masks=("1", "4"), opacity=1.0)))
    for column, i in ((70, 1), (220, 4)):
        assert (picture[150, column] == rendering.MASK_COLOURS[i]).all()
    assert len({tuple(colour) for colour in picture.reshape(-1, 3)}) == 3
    assert len(set(scan.colours.values())) == 6


def test_a_heat_map_covers_the_slice_where_it_is_high_and_leaves_it_where_it_is_low(marked):
    values = np.zeros((2, 2, 2))
    values[1, 0, 1] = 3  # head, front, left: where the block is
    halves = np.array([[10, 0, 0, 4.5], [0, 15, 0, 7], [0, 0, 20, 9.5], [0, 0, 0, 1]])
    heat_map = HeatMap(values, marked.affine @ halves)
    for plane, index in {"axial": 16, "coronal": 5, "sagittal": 33}.items():
        plain = np.asarray(rendering.render(marked, plane, index, height=300)).astype(int)
        hot = np.asarray(rendering.render(marked, plane, index, height=300, heat_map=heat_map)).astype(int)
        changed = np.abs(hot - plain).sum(-1)
        upper, left = changed[: len(changed) // 2].sum(), changed[:, : hot.shape[1] // 2].sum() / changed.sum()
        assert upper / changed.sum() > 0.7  # front in axial slices, head in the others
        assert left > 0.7 if plane == "sagittal" else left < 0.3  # front; left of the patient
        assert (changed[-20:, -20:] if plane == "sagittal" else changed[-20:, :20]).max() == 0
    share = rendering.heat_share(heat_map, marked, "axial", 19)
    assert share.shape == (30, 40) and share.dtype == np.float32
    assert share[0, -1] == 1 and share[-1, 0] == 0  # flat in the outer half of the outermost cells


def test_a_heat_map_that_says_nothing_here_or_is_the_same_everywhere_leaves_the_slice_alone(marked):
    plain = np.asarray(rendering.render(marked, "axial", 5))
    far = marked.affine.copy()
    far[2, 3] += 5000
    for heat_map in (HeatMap(np.arange(8.0).reshape(2, 2, 2), far), HeatMap(np.ones((2, 2, 2)), marked.affine)):
        np.testing.assert_array_equal(plain, np.asarray(rendering.render(marked, "axial", 5, heat_map=heat_map)))


def test_each_colour_map_is_readable_in_grey_too():
    for name in rendering.COLOUR_MAPS:
        light = rendering.colour_table(name) @ [0.299, 0.587, 0.114]
        assert (np.diff(light) > -1.5).all() and light[-1] - light[0] > 130, name


def test_a_gallery_names_each_finding_and_points_at_it(study):
    name, mask = next(iter(study.masks.items()))
    figure = rendering.finding_gallery([study, study, study], columns=2)
    assert [ax.get_title() for ax in figure.axes] == [name, name, name, ""]
    piece = mask[rendering.largest_slice(mask)]
    for ax in figure.axes[:3]:
        x, y = ax.texts[0].xy
        rows, columns = np.argwhere(ndimage.binary_dilation(piece)).T * np.array([study.volume.spacing[1:]]).T
        assert np.hypot(rows - y, columns - x).min() < max(study.volume.spacing)
        assert ax.get_xlim()[0] <= x <= ax.get_xlim()[1] and ax.get_ylim()[1] <= y <= ax.get_ylim()[0]


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_an_arrow_ends_at_the_largest_piece_and_lies_in_the_crop(data):
    number = st.integers(0, 199)
    mask, spacing = np.zeros((200, 160), bool), (1.5, 2.0)
    for _ in range(data.draw(st.integers(1, 3))):
        top, left = data.draw(number), data.draw(number) % 160
        mask[top : top + data.draw(st.integers(1, 80)), left : left + data.draw(st.integers(1, 80))] = True
    (left, top, side), tip, tail = rendering._pointed_at(mask, spacing)
    pieces, count = ndimage.label(mask)
    sizes = [(pieces == i + 1).sum() for i in range(count)]
    distances = [np.hypot(*((np.argwhere(pieces == i + 1) + 0.5) * spacing - tip[::-1]).T).min() for i in range(count)]
    assert min(d for d, size in zip(distances, sizes, strict=True) if size == max(sizes)) <= 2.0
    assert side <= 320 and 0 <= top <= 300 and 0 <= left <= 320
    inside = [
        (left - 1e-6 <= x <= left + side + 1e-6) and (top - 1e-6 <= y <= top + side + 1e-6) for x, y in (tip, tail)
    ]
    assert inside[0] and (inside[1] or side > 250)


@pytest.mark.parametrize(
    ("error", "message", "act"),
    [
        (TypeError, "expected a CTVolume, as read_volume.path. gives it, got ndarray", lambda s: Scan.of(s.volume.hu)),
        (ValueError, r"mask 'x' has shape \(2, 2, 2\), the volume \(32, 64, 64\)",
            lambda s: rendering.render(s.volume, "axial", 0, masks={"x": np.zeros((2, 2, 2))})),
        (ValueError, "unknown window 'liver'; choose one of lung, mediastinum, bone",
            lambda s: rendering.render(s.volume, "axial", 0, "liver")),
        (ValueError, "unknown plane 'oblique'", lambda s: rendering.render(s.volume, "oblique", 0)),
        (IndexError, "axial slice 32: .* has slices 0 to 31", lambda s: rendering.render(s.volume, "axial", 32)),
        (ValueError, "width must be above 0", lambda s: rendering.window(0, 40, 0)),
        (ValueError, r"window \(40.0, 0.0\): expected a preset, or a", lambda s: rendering.window_of((40, 0))),
        (ValueError, r"window \(1.0, 2.0, 3.0\): expected a preset", lambda s: rendering.window_of((1, 2, 3))),
        (ValueError, r"orientation IAR, expected SPL: pass volume.reoriented\(\)",
            lambda s: rendering.render(s.volume.reoriented("IAR"), "axial", 0)),
        (ValueError, "unknown colour map 'jet'; choose one of inferno", lambda s: rendering.colour_table("jet")),
        (ValueError, "studies with findings: give at least one", lambda s: rendering.finding_gallery([])),
        (ValueError, "leave out those without", lambda s: rendering.finding_gallery([s, generate(1, findings=[])])),
    ],
)  # fmt: skip
def test_bad_input_is_refused(study, error, message, act):
    with pytest.raises(error, match=message):
        act(study)
