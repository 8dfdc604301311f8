"""A viewer that reacts: sliders, mouse, keys, a second volume, other studies."""

import html
import io
import re
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from medctkit.phantom.study import generate
from medctkit.scans.heat_map import HeatMap
from medctkit.scans.volumes import CTVolume
from medctkit.viewers.drawing import canvases
from medctkit.viewers.drawing.hints import HELP
from medctkit.viewers.drawing.rendering import PLANES, WINDOWS
from medctkit.viewers.slice_viewer import SliceViewer

# ipympl's toolbar, which is never shown
pytestmark = pytest.mark.filterwarnings("ignore:Passing unrecognized arguments to super.Toolbar:DeprecationWarning")


@pytest.fixture(scope="module")
def study():
    return generate(4, findings=["Pleural effusion", "Lung nodule"], shape=(32, 64, 64))


@pytest.fixture(scope="module")
def heat_maps(study):
    values = np.linspace(0, 1, 8 * 8 * 8).reshape(8, 8, 8)
    affine = study.volume.affine @ np.diag([*(n / 8 for n in study.volume.shape), 1])
    return {"rollout": HeatMap(values, affine, "rollout"), "relevance": HeatMap(values[::-1], affine, "relevance")}


@pytest.fixture
def viewer(study, heat_maps):
    viewer = SliceViewer(study.volume, study.masks, heat_maps=heat_maps, canvas="plain")
    yield viewer
    viewer.close()


@pytest.fixture
def clicked(study):
    """A viewer that hears mouse and keys; `happens` is what a page sends."""
    viewer = SliceViewer(study.volume, study.masks, canvas="ipympl")

    def happens(what, x=0.0, y=0.0, **more):
        common = {"x": x, "y": y, "button": 0, "buttons": 0, "modifiers": [], "guiEvent": {}}
        viewer.canvas.widget._handle_message(None, {"type": what} | common | more, [])

    viewer.happens = happens
    yield viewer
    viewer.close()


def pixels(viewer):
    return np.asarray(Image.open(io.BytesIO(viewer.canvas.widget.value)))


def middle_of(viewer, plane, scan=0):
    panel = next(p for p in viewer._composition.panels if (p.plane, p.scan) == (plane, scan))
    return panel.left + panel.size[0] / 2, panel.top + panel.size[1] / 2


# --- controls ---------------------------------------------------------------------------------------------


def test_every_control_changes_the_picture(viewer):
    controls = {"axial": viewer.sliders["axial"], "nodule": viewer.mask_boxes["Lung nodule"]}
    controls |= {plane: viewer.sliders[plane] for plane in PLANES}
    names = ("preset", "centre", "width", "opacity", "heat_map", "heat_opacity", "colour_map", "crosshair", "view")
    controls |= {name: getattr(viewer, name) for name in names}
    seen = pixels(viewer)
    for name, value in (
        ("axial", 10), ("coronal", 20), ("sagittal", 40), ("preset", "mediastinum"), ("preset", "bone"),
        ("centre", 100), ("width", 900), ("nodule", True), ("opacity", 0.9), ("heat_map", "relevance"),
        ("heat_opacity", 0.9), ("colour_map", "viridis"), ("crosshair", False), ("view", "coronal"),
    ):  # fmt: skip
        controls[name].value = value
        now = pixels(viewer)
        assert now.shape != seen.shape or (now != seen).any(), name
        seen = now
    assert viewer.preset.value == "free" and viewer.messages.text == ""
    assert "application/vnd.jupyter.widget-view+json" in viewer._repr_mimebundle_()


def test_choosing_a_preset_sets_both_sliders_and_stays(viewer):
    for name, (centre, width) in WINDOWS.items():
        viewer.preset.value = name
        assert (viewer.preset.value, viewer.centre.value, viewer.width.value) == (name, centre, width)
    viewer.preset.value = "lung"
    before = pixels(viewer)
    viewer.centre.value = 40  # the centre of "mediastinum", with the width of "lung"
    assert viewer.preset.value == "free" and "centre 40 HU, width 1500 HU" in viewer.readout.value
    assert (pixels(viewer) != before).any()
    free = SliceViewer(viewer.scans[0].volume, window=(2000, 6000))  # not bent to the sliders
    assert (free.centre.value, free.width.value, free.preset.value) == (2000, 6000, "free")


def test_choosing_a_mask_goes_to_where_it_is_and_tints_it(viewer, study):
    moved = []
    viewer.on_move(moved.append)
    viewer.mask_boxes["Lung nodule"].value = True
    mask = study.masks["Lung nodule"]
    assert mask[viewer.voxel] and mask[viewer.voxel[0]].sum() == mask.sum(axis=(1, 2)).max()
    assert "inside of Lung nodule" in viewer.readout.value and len(moved) == 1
    viewer.heat_map.value = "none"
    tinted = np.asarray(viewer.picture()).astype(int)[: viewer._composition.size[1]]
    assert ((tinted[..., 0] - tinted[..., 2]) > 200).any()  # the outline; greys have none
    at = viewer.position
    viewer.mask_boxes["Lung nodule"].value = False
    assert (viewer.position == at).all() and viewer.chosen_masks == ()


def test_without_masks_and_maps_there_are_no_controls_for_them_and_an_empty_mask_is_chosen_without_a_jump(study):
    viewer = SliceViewer(study.volume)
    assert (viewer._mask_row.layout.display, viewer._heat_row.layout.display) == ("none", "none")
    viewer.set_volume(study.volume, study.masks)
    assert (viewer._mask_row.layout.display, viewer._heat_row.layout.display) == (None, "none")
    assert [*viewer.mask_boxes] == [*study.masks]
    viewer.set_volume(study.volume, {"nothing": np.zeros(study.volume.shape, bool)})
    before = viewer.voxel
    viewer.mask_boxes["nothing"].value = True
    assert viewer.voxel == before and viewer.messages.text == ""


# --- the crosshair ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", ["SPL", "IAR", "LPS", "PRS"])
def test_position_and_value_are_those_of_the_volume_as_it_was_given(orientation):
    hu = np.random.default_rng(0).integers(-1000, 1000, (9, 12, 15)).astype(np.int16)
    volume = CTVolume(hu, (5.0, 2.0, 3.0)).reoriented(orientation)
    viewer = SliceViewer(volume)
    for index in np.random.default_rng(1).integers(0, volume.shape, (6, 3)):
        place = volume.affine[:3, :3] @ index + volume.affine[:3, 3]
        viewer.move_to(place)
        np.testing.assert_allclose(viewer.position, place, atol=1e-6)
        sides = zip("RAS", "LPI", place.round().astype(int), strict=True)
        where = ", ".join(f"{far if mm < 0 else near} {abs(mm)} mm" for near, far, mm in sides)
        shown = f"{where} · {volume.hu[tuple(index)]} HU"
        assert shown in viewer.readout.value
        assert viewer.scans[0].described(viewer.voxel) == shown


def test_every_move_is_told_once(viewer):
    told = []
    viewer.on_move(told.append)
    viewer.sliders["coronal"].value += 3
    np.testing.assert_array_equal(told, [viewer.position])
    viewer.move_to(viewer.scans[0].point_of((1, 2, 3)))
    assert len(told) == 2 and viewer.voxel == (1, 2, 3)
    viewer.move_to(viewer.position + 0.1)  # the same voxel: no move
    assert len(told) == 2
    viewer.move_to([1e4, -1e4, 1e4])  # outside: the nearest voxel
    assert len(told) == 3 and viewer.voxel == (31, 63, 0)
    viewer.preset.value = "bone"
    assert len(told) == 3
    for point in ([1, 2], [np.nan, 0, 0]):
        with pytest.raises(ValueError, match="expected three finite patient coordinates"):
            viewer.move_to(point)


# --- mouse and keys ---------------------------------------------------------------------------------------


def test_a_click_moves_the_crosshair_and_a_drag_takes_it_along(clicked):
    told = []
    clicked.on_move(told.append)
    x, y = middle_of(clicked, "coronal")
    clicked.happens("button_press", x + 40, y - 30, buttons=1)
    panel = clicked._composition.panel_at(x, y)
    assert clicked.voxel == panel.voxel(x + 40, y - 30, 31) and clicked.voxel[1] == 31
    assert clicked.voxel[0] > 16 and clicked.voxel[2] > 32  # towards head and left
    clicked.happens("motion_notify", x - 40, y - 30, buttons=1)
    assert clicked.voxel[2] < 31 and len(told) == 2
    clicked.happens("button_release", x - 40, y - 30)
    at = clicked.voxel
    x, y = x + 1, y + 1
    clicked.happens("motion_notify", x, y)
    assert clicked.voxel == at  # only a look
    voxel = panel.voxel(x, y, at[1])
    assert f"under the cursor: {clicked.scans[0].described(voxel)}<" in clicked.hover.value
    clicked.sliders["coronal"].value = 40  # another slice comes under the cursor
    assert f"under the cursor: {clicked.scans[0].described(panel.voxel(x, y, 40))}<" in clicked.hover.value


def test_the_wheel_turns_the_slice_under_the_mouse_and_stops_at_the_ends(clicked):
    for plane, slider in clicked.sliders.items():
        before = clicked.voxel
        x, y = middle_of(clicked, plane)
        clicked.happens("scroll", x, y, step=1)
        clicked.happens("scroll", x, y, step=1)
        clicked.happens("scroll", x, y, step=-1)
        assert np.subtract(clicked.voxel, before).tolist() == [int(i == PLANES[plane]) for i in range(3)]
        slider.value = slider.max
        clicked.happens("scroll", x, y, step=1)
        assert slider.value == slider.max
    at = clicked.voxel
    clicked.happens("scroll", clicked._composition.size[0] - 1, 0.5 + clicked._composition.size[1], step=1)
    assert clicked.voxel == at  # beside the slices


def test_keys_do_what_the_help_says(clicked):
    assert clicked._help.layout.display == "none"
    clicked.happens("key_press", key="shift+k?")
    assert clicked._help.layout.display is None and all(html.escape(word) in clicked._help.value for word in HELP)
    x, y = middle_of(clicked, "sagittal")
    clicked.happens("button_press", x, y, buttons=1)
    at = clicked.sliders["sagittal"].value
    for key, change in (("ArrowUp", 1), ("ArrowRight", 2), ("PageUp", 12), ("ArrowDown", 11), ("PageDown", 1)):
        clicked.happens("key_press", key=f"k{key}")
        clicked.happens("key_release", key=f"k{key}")
        assert clicked.sliders["sagittal"].value == at + change, key
    for key, name in zip("123", WINDOWS, strict=True):
        clicked.happens("key_press", key=f"k{key}")
        assert clicked.preset.value == name
    clicked.happens("key_press", key="kc")
    assert clicked.crosshair.value is False
    clicked.mask_boxes["Lung nodule"].value = True
    clicked.happens("key_press", key="km")
    assert clicked.chosen_masks == ()
    clicked.happens("key_press", key="km")
    assert clicked.chosen_masks == tuple(clicked.mask_boxes)
    for key, tool in (("d", "distance"), ("r", "region"), ("x", "crosshair")):
        clicked.happens("key_press", key=f"k{key}")
        assert clicked.tool.value == tool
    clicked.happens("key_press", key="k+")
    assert clicked.zoom.value == 1.5
    clicked.happens("key_press", key="k0")
    clicked.happens("key_press", key="ks")
    assert (clicked.zoom.value, clicked.slab.value) == (1, "maximum")
    clicked.happens("key_press", key="kq")  # matplotlib's key for closing a figure
    assert clicked.canvas.widget.comm is not None


def test_a_drag_with_the_right_button_changes_window_and_level(clicked):
    x, y = middle_of(clicked, "axial")
    at, (centre, width) = clicked.voxel, WINDOWS["lung"]
    clicked.happens("button_press", x, y, button=2, buttons=2)
    for i in (1, 2):
        clicked.happens("motion_notify", x + 10 * i, y + 20 * i, button=2, buttons=2)
    assert width < clicked.width.value < 1.2 * width and centre < clicked.centre.value
    assert clicked.preset.value == "free" and clicked.voxel == at
    clicked.happens("button_release", x, y, button=2)


def test_the_zoom_keeps_the_crosshair_in_sight_and_a_click_means_what_is_seen(clicked):
    clicked.move_to(clicked.scans[0].point_of((4, 50, 10)))
    x, y = middle_of(clicked, "axial")
    clicked.happens("scroll", x, y, step=1, modifiers=["ctrl"])
    assert clicked.zoom.value == 1.5 and clicked.voxel[0] == 4
    clicked.zoom.value = 4
    panel = clicked._composition.panel_at(x, y)
    assert clicked._composition.panel_at(*panel.place(clicked.voxel)) == panel
    clicked.happens("button_press", x, y, buttons=1)
    assert np.hypot(*np.subtract(panel.place(clicked.voxel), (x, y))) <= panel.size[0] * 4 / 64
    clicked.move_to(clicked.scans[0].point_of((28, 5, 60)))  # far out of what was seen
    assert clicked._composition.shows([clicked.voxel])
    clicked.zoom.value = 1
    assert all(panel.view == (0, 0, 1, 1) for panel in clicked._composition.panels)


def test_a_distance_is_in_millimetres_and_a_region_has_the_hu_inside(clicked):
    scan = clicked.scans[0]
    panel = clicked._composition.panels[0]
    ends = [tuple(n + 1 for n in panel.place(voxel)) for voxel in ((20, 20, 20), (20, 40, 35))]
    clicked.tool.value = "distance"
    before = np.asarray(clicked.picture())
    clicked.happens("button_press", *ends[0], buttons=1)
    clicked.happens("motion_notify", *ends[1], buttons=1)
    clicked.happens("button_release", *ends[1])
    start, end = (np.array(panel.voxel(*at, clicked.voxel[0])) for at in ends)
    expected = np.linalg.norm((end - start) * scan.volume.spacing)
    assert f"distance {expected:.1f} mm" in clicked.readout.value and expected > 50
    assert (np.asarray(clicked.picture()) != before).any()
    clicked.tool.value = "region"
    clicked.happens("button_press", *ends[0], buttons=1)
    clicked.happens("motion_notify", *ends[1], buttons=1)
    inside = clicked.measurement.inside(scan)
    box = scan.volume.hu[end[0], start[1] : end[1] + 1, start[2] : end[2] + 1]
    assert inside.size == pytest.approx(np.pi / 4 * box.size, rel=0.05)
    assert f"mean {inside.mean():.0f} HU, deviation {inside.std():.0f} HU" in clicked.readout.value
    clicked.tool.value = "crosshair"
    assert "region" not in clicked.readout.value and clicked.measurement is None


def test_the_page_does_not_move_while_one_looks(viewer):
    viewer.set_heat_maps({})
    height = viewer.readout.value.count("<div")
    viewer.mask_boxes["Lung nodule"].value = True
    viewer.tool.value = "distance"
    viewer.slab.value = "mean"
    assert viewer.readout.value.count("<div") == height and "<br" not in viewer.readout.value


def test_both_canvases_show_the_same_picture(clicked, study):
    sent = []
    clicked.canvas.widget.send = lambda content, buffers=None: sent.extend(buffers or [])
    plain = SliceViewer(study.volume, study.masks, canvas="plain")
    for viewer in (clicked, plain):
        viewer.sliders["axial"].value = 20
    assert sent[-1] == plain.canvas.widget.value
    clicked.canvas.widget.handle_event({"type": "set_device_pixel_ratio", "device_pixel_ratio": 2})
    clicked.sliders["axial"].value = 21
    size = Image.open(io.BytesIO(sent[-1])).size
    assert size == tuple(2 * n for n in clicked.picture().size)  # a fine screen
    x, y = middle_of(clicked, "axial")
    clicked.happens("scroll", x, y, step=1)  # the page's pixels stay what they are
    assert clicked.sliders["axial"].value == 22


def test_the_first_picture_is_kept_for_a_page_without_a_kernel(clicked):
    kept = clicked.canvas.widget.get_state()["_data_url"]
    assert kept.startswith("data:image/jpeg;base64,") and tuple(clicked.canvas.widget._size) == clicked.picture().size
    assert len(kept) < 400_000


def test_the_canvas_leaves_the_figures_of_a_notebook_alone(study, monkeypatch):
    for name in ("ipympl", "ipympl.backend_nbagg"):  # each asks for the backend when it is imported
        monkeypatch.delitem(sys.modules, name, raising=False)
    canvases._ipympl.cache_clear()
    before = plt.get_backend(), plt.get_fignums()
    SliceViewer(study.volume, canvas="ipympl").close()
    assert (plt.get_backend(), plt.get_fignums()) == before
    assert isinstance(SliceViewer(study.volume).canvas, canvases.PlainCanvas)  # nobody could click


# --- two volumes, other studies, maps -----------------------------------------------------------------------


def test_a_second_volume_is_told_of_and_a_click_on_it_moves_both(study):
    hu = np.random.default_rng(0).integers(-1000, 1000, (30, 40, 50)).astype(np.int16)
    other, names = CTVolume(hu, (5.0, 5.0, 5.0)), ("source hospital", "target hospital")
    viewer = SliceViewer(study.volume, other=other, names=names, canvas="ipympl")
    assert "linked by the distance from the middle of each scan" in viewer.readout.value
    assert re.search("target hospital: [RL] ", viewer.readout.value) and len(viewer._composition.panels) == 6
    x, y = middle_of(viewer, "axial", scan=1)
    panel = viewer._composition.panel_at(x + 20, y - 20)
    aimed = panel.voxel(x + 20, y - 20, viewer._linked.voxels(viewer.voxel)[1][0])
    viewer._on_canvas("press", x + 20, y - 20, None)
    _, second = viewer._linked.voxels(viewer.voxel)
    steps = np.divide(viewer.scans[0].volume.spacing, 5) / 2 + 0.5  # the first scan's voxels may be coarser
    assert (np.abs(np.subtract(second, aimed)) <= steps).all() and viewer.voxel[2] > 32


def test_another_study_takes_the_place_of_the_first_and_window_and_view_stay(viewer):
    told = []
    viewer.on_move(told.append)
    viewer.preset.value, viewer.view.value, viewer.heat_opacity.value = "bone", "sagittal", 0.3
    box = viewer.mask_boxes["Lung nodule"]
    hu = np.zeros((10, 12, 14), np.int16)
    viewer.set_volume(CTVolume(hu, (5.0, 5.0, 5.0)), {"a": hu > 0})
    assert viewer.voxel == (4, 5, 6) and [slider.max for slider in viewer.sliders.values()] == [9, 11, 13]
    assert (viewer.preset.value, viewer.view.value, viewer.heat_opacity.value) == ("bone", "sagittal", 0.3)
    assert [*viewer.mask_boxes] == ["a"] and viewer.heat_map.options == ("none",) and box.comm is None
    assert told == []
    viewer.sliders["axial"].value = 9
    assert len(told) == 1 and viewer.messages.text == ""


def test_a_study_that_is_refused_leaves_the_old_one(viewer, study):
    before, shown = viewer.canvas.widget.value, viewer.voxel
    with pytest.raises(ValueError, match=r"mask 'x' has shape \(2, 2, 2\), the volume"):
        viewer.set_volume(CTVolume(np.zeros((50, 10, 10), np.int16), (1.0, 5.0, 5.0)), {"x": np.zeros((2, 2, 2))})
    with pytest.raises(TypeError, match="heat map 'x' is of type ndarray, expected a HeatMap; HeatMap.of_voxels"):
        viewer.set_heat_maps({"x": np.zeros(study.volume.shape)})
    assert viewer.canvas.widget.value == before and viewer.voxel == shown
    viewer.sliders["axial"].value += 1
    assert viewer.canvas.widget.value != before


def test_maps_are_exchanged_and_the_first_is_shown(viewer, heat_maps, study):
    assert viewer.heat_map.value == "rollout" and "rollout: " in viewer.readout.value
    value = float(heat_maps["rollout"].at(viewer.position[None])[0])
    assert f"rollout: {value:.3g}" in viewer.readout.value
    viewer.heat_opacity.value = 0.35
    viewer.set_heat_maps({"relevance": heat_maps["relevance"]})
    assert viewer.look.heat_map is heat_maps["relevance"] and viewer.heat_opacity.value == 0.35
    far = study.volume.affine.copy()
    far[2, 3] += 9000
    viewer.set_heat_maps({"far": HeatMap(np.zeros((2, 2, 2)), far)})
    assert "heat map: does not reach this place" in viewer.readout.value
    viewer.set_heat_maps({})
    assert viewer.look.heat_map is None and viewer._heat_row.layout.display == "none"


# --- errors, files ------------------------------------------------------------------------------------------


def test_an_error_in_a_callback_is_shown_and_raised_and_the_widget_lives_on(viewer):
    def broken(position):
        raise KeyError("of the callback")

    viewer.on_move(broken)
    with pytest.raises(KeyError):
        viewer.sliders["axial"].value += 1
    assert viewer.messages.text == "KeyError: 'of the callback'"
    assert "medctkit-error" in viewer.messages.widget._dom_classes
    with pytest.raises(KeyError):
        viewer.move_to(viewer.scans[0].middle + 50)
    before = viewer.canvas.widget.value
    viewer.preset.value = "bone"
    assert viewer.messages.text == "" and viewer.canvas.widget.value != before


@pytest.mark.parametrize(
    ("error", "message", "given"),
    [
        (TypeError, "expected a CTVolume", {"volume": "scan.nii.gz"}),
        (ValueError, r"mask 'x' has shape \(2, 2, 2\), the volume", {"masks": {"x": np.zeros((2, 2, 2))}}),
        (ValueError, "unknown window 'liver'; choose one of lung, mediastinum, bone", {"window": "liver"}),
        (ValueError, "unknown canvas 'webgl'; choose one of ipympl, plain, or None", {"canvas": "webgl"}),
        (ValueError, "expected two", {"other": CTVolume(np.zeros((2, 2, 2)), (1, 1, 1)), "names": ["one"]}),
    ],
)
def test_bad_input_is_refused(study, error, message, given):
    with pytest.raises(error, match=message):
        SliceViewer(**{"volume": study.volume} | given)


def test_picture_and_stack_are_saved_with_what_is_shown(viewer, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    saved = np.asarray(Image.open(viewer.to_png("~/slice.png")))
    np.testing.assert_array_equal(saved, np.asarray(viewer.picture()))
    viewer.preset.value = "bone"
    viewer.mask_boxes["Lung nodule"].value = True
    page = viewer.to_html("~/stack.html", "coronal", title="Phantom 4").read_text()
    assert "<h1>Phantom 4, coronal</h1>" in page and "marked: Lung nodule" in page
    assert re.findall(r'name="window" value="\d"(?: checked)?> (\w+)', page) == ["bone", "lung"]
    assert "rollout, 0 to 1" in page


def test_closing_lets_go_of_the_volume(study):
    viewer = SliceViewer(study.volume, canvas="ipympl")
    controls = [viewer.widget, viewer.canvas.widget, viewer.view, viewer.opacity, *viewer.sliders.values()]
    viewer.close()
    assert viewer.scans == () and all(control.comm is None for control in controls)
