"""Several slices in one picture, and which voxel lies under which pixel."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from medctkit.scans.heat_map import HeatMap
from medctkit.scans.volumes import CTVolume
from medctkit.viewers.drawing import composition
from medctkit.viewers.drawing.composition import CROSSHAIR, Composition
from medctkit.viewers.drawing.rendering import PLANES, Look, Scan, colour_table


def scan(shape=(20, 30, 40), spacing=(5.0, 2.0, 2.0), seed=0):
    hu = np.random.default_rng(seed).integers(-1000, 1000, shape).astype(np.int16)
    return Scan.of(CTVolume(hu, spacing))


sides = st.integers(1, 60)
spacings = st.floats(0.3, 8)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.tuples(sides, sides, sides), st.tuples(spacings, spacings, spacings)), min_size=1, max_size=2
    ),
    st.sampled_from([tuple(PLANES), ("axial",), ("coronal",), ("sagittal",)]),
    st.data(),
)
def test_a_pixel_and_the_voxel_under_it_find_each_other(scans, planes, data):
    scans = [Scan.of(CTVolume(np.zeros(shape, np.int16), spacing)) for shape, spacing in scans]
    whole = Composition(scans, planes, height=200)
    assert len(whole.panels) == len(scans) * len(planes)
    for panel in whole.panels:
        # inside of the picture, and pixels of every panel have the same size in mm (to a rounded pixel)
        assert panel.left + panel.size[0] <= whole.size[0] and panel.top + panel.size[1] <= whole.size[1]
        x = panel.left + data.draw(st.floats(0, panel.size[0] - 1e-3))
        y = panel.top + data.draw(st.floats(0, panel.size[1] - 1e-3))
        index = data.draw(st.integers(0, panel.shape[PLANES[panel.plane]] - 1))
        assert whole.panel_at(x, y) == panel
        voxel = panel.voxel(x, y, index)
        assert voxel[PLANES[panel.plane]] == index
        assert all(0 <= i < n for i, n in zip(voxel, panel.shape, strict=True))
        back = panel.place(voxel)
        counts = [n for axis, n in enumerate(panel.shape) if axis != PLANES[panel.plane]]
        assert abs(back[0] - x) <= panel.size[0] / counts[1] / 2 + 1e-6  # half a voxel at most
        assert abs(back[1] - y) <= panel.size[1] / counts[0] / 2 + 1e-6
        assert panel.voxel(*back, index) == voxel


def test_panels_do_not_overlap_and_share_one_scale():
    whole = Composition([scan(), scan((50, 60, 20), (2.0, 1.0, 3.0))], height=300)
    covered = np.zeros(whole.size[::-1], int)
    for panel in whole.panels:
        covered[panel.top : panel.top + panel.size[1], panel.left : panel.left + panel.size[0]] += 1
    assert covered.max() == 1
    widths = [panel.size[0] for panel in whole.panels]
    millimetres = [80, 80, 60, 60, 60, 60]
    np.testing.assert_allclose(np.array(widths) / millimetres, widths[0] / 80, rtol=0.02)
    assert [(p.scan, p.plane) for p in whole.panels] == [(i, plane) for i in (0, 1) for plane in PLANES]
    assert whole.size[0] <= 2.35 * 300 + 2 * composition.GAP + 2


def test_two_scans_of_one_plane_lie_side_by_side():
    left, right = Composition([scan(), scan()], ["axial"], height=200).panels
    assert (left.top, left.size) == (right.top, right.size) and right.left == left.size[0] + composition.GAP
    single = Composition([scan()], ["axial"], height=200).panels[0]
    assert single.size == (470, 352)  # 1.8 times as tall, but for a picture that is 2.35 heights wide


def test_the_first_of_three_planes_is_large_and_the_others_lie_beside_it():
    whole = Composition([scan()], height=200)
    large, *small = whole.panels
    assert all(panel.left == large.size[0] + composition.GAP for panel in small)
    assert small[1].top == small[0].size[1] + composition.GAP
    assert large.size[1] - 2 <= small[1].top + small[1].size[1] <= large.size[1] + 2 or large.size[1] == whole.size[1]
    assert small[0].size[0] < large.size[0] <= 2.35 * 200


def test_the_crosshair_marks_its_voxel_and_leaves_it_free():
    whole = Composition([scan()], height=300)
    for voxel in ((10, 15, 20), (0, 0, 0), (19, 29, 39)):
        with_cross = np.asarray(whole.picture([voxel], Look()))
        without = np.asarray(whole.picture([voxel], Look(), crosshair=False))
        for panel in whole.panels:
            x, y = map(round, panel.place(voxel))
            part = (slice(panel.top, panel.top + panel.size[1]), slice(panel.left, panel.left + panel.size[0]))
            changed = np.argwhere((with_cross[part] != without[part]).any(-1)) + (panel.top, panel.left)
            assert ((changed[:, 0] == y) | (changed[:, 1] == x)).all() and len(changed) > 50
            assert np.abs(changed - (y, x)).max(1).min() == composition._HOLE
            assert (with_cross[tuple(changed.T)] == CROSSHAIR).all()


def test_only_slices_that_change_are_drawn_again(monkeypatch):
    drawn, draw_slice = [], composition.draw_slice
    monkeypatch.setattr(
        composition, "draw_slice", lambda s, plane, *rest: drawn.append(plane) or draw_slice(s, plane, *rest)
    )
    whole = Composition([scan()], height=100)
    first = np.asarray(whole.picture([(10, 15, 20)], Look()))
    whole.picture([(11, 15, 20)], Look())
    assert drawn == ["axial", "coronal", "sagittal", "axial"]
    whole.picture([(11, 15, 20)], Look((40, 400)))
    assert len(drawn) == 7
    np.testing.assert_array_equal(first, np.asarray(whole.picture([(10, 15, 20)], Look())))
    for index in range(20):
        whole.picture([(index, 15, 20)], Look())
    assert len(whole._drawn) == 3  # memory stays flat


def test_the_legend_names_masks_and_the_map_in_their_colours():
    volume = scan().volume
    masks = {name: volume.hu > 0 for name in ("nodule", "effusion", "a mask with a very long name " * 3)}
    shown = Scan.of(volume, masks)
    whole = Composition([shown], height=300)
    heat_map = HeatMap(np.eye(2)[None], np.eye(4), "relevance")
    voxel, look = [(10, 15, 20)], Look(masks=("nodule", "effusion"), heat_map=heat_map)
    assert whole.picture(voxel, Look()).size == whole.size
    picture = np.asarray(whole.picture(voxel, look))
    legend = picture[whole.size[1] :]
    assert len(legend) == 22
    colours = {tuple(c) for c in legend.reshape(-1, 3)}
    assert {(230, 159, 0), (86, 180, 233), tuple(colour_table("inferno")[-1])} <= colours  # two masks, the map's end
    assert (213, 94, 0) not in colours
    wrapped = whole.picture(voxel, Look(masks=tuple(masks), heat_map=look.heat_map))
    assert wrapped.size[1] == whole.size[1] + 44


def test_masks_and_maps_belong_to_the_first_scan():
    first = Scan.of(scan().volume, {"m": np.ones((20, 30, 40), bool)})
    whole = Composition([first, scan(seed=0)], ["axial"], height=100)
    picture = np.asarray(whole.picture([(3, 4, 5)] * 2, Look(masks=("m",), opacity=1.0), crosshair=False))
    left, right = whole.panels
    assert (picture[30, left.size[0] // 2 + 20] == (230, 159, 0)).all()
    at = picture[30, right.left + right.size[0] // 2 + 20]
    assert at[0] == at[1] == at[2]
