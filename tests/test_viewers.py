"""Slices the way radiologists hang them, and a viewer that reacts."""

import io
import math

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from medctkit import viewers
from medctkit.phantom import generate
from medctkit.volumes import CTVolume


@pytest.fixture(scope="module")
def marked():
    """Air with one bright block at the patient's left, front and head."""
    hu = np.full((20, 30, 40), -1000, np.int16)
    hu[15:18, 3:7, 30:36] = 1000
    return CTVolume(hu, (5.0, 2.0, 2.0))


@pytest.fixture(scope="module")
def study():
    return generate(4, findings=["Pleural effusion", "Lung nodule"])


def bright(volume, plane, index):
    """Where the picture is bright, as (row, column) shares of its size."""
    picture = viewers.render(volume, plane, index, "bone", height=200)
    grey = np.asarray(picture).astype(int)
    white = np.argwhere(grey.min(axis=2) > 190)
    return white.mean(axis=0) / grey.shape[:2]


@pytest.mark.parametrize("orientation", ["SPL", "IAR", "LPS", "PRS", "AIL"])
def test_every_orientation_is_hung_the_same_way(marked, orientation):
    shown, _ = viewers._checked(marked.reoriented(orientation), None)
    row, column = bright(shown, "axial", 16)
    assert row < 0.3 and column > 0.7  # front up, patient's left on the right
    row, column = bright(shown, "coronal", 5)
    assert row < 0.3 and column > 0.7  # head up, patient's left on the right
    row, column = bright(shown, "sagittal", 33)
    assert row < 0.3 and column < 0.3  # head up, front on the left


def test_pixels_have_the_right_aspect_ratio(marked):
    for plane, (tall, wide) in {"axial": (60, 80), "coronal": (100, 80), "sagittal": (100, 60)}.items():
        size = viewers.render(marked, plane, 5, height=300).size
        assert size[1] == 300 and abs(size[0] - 300 * wide / tall) <= 1


def test_windows_map_their_ends_to_black_and_white():
    for centre, width in viewers.WINDOWS.values():
        grey = viewers.window([centre - width, centre - width / 2, centre, centre + width / 2, 9999], centre, width)
        np.testing.assert_allclose(grey, [0, 0, 0.5, 1, 1])


def pixels(viewer):
    return np.asarray(Image.open(io.BytesIO(viewer.image.value)))


def test_every_control_changes_the_picture(study):
    viewer = viewers.SliceViewer(study.volume, study.masks)
    seen = [pixels(viewer)]
    for control, value in (
        ("index", 10), ("preset", "mediastinum"), ("preset", "bone"), ("centre", 100), ("width", 900),
        ("mask", "Pleural effusion"), ("opacity", 0.9), ("plane", "coronal"), ("plane", "sagittal"),
    ):  # fmt: skip
        getattr(viewer, control).value = value
        now = pixels(viewer)
        assert now.shape != seen[-1].shape or (now != seen[-1]).any(), control
        seen.append(now)
    assert viewer.preset.value == "free" and "sagittal slice" in viewer.caption.value
    assert "application/vnd.jupyter.widget-view+json" in viewer._repr_mimebundle_()


def test_choosing_a_preset_sets_both_sliders_and_stays(study):
    viewer = viewers.SliceViewer(study.volume)
    for name, (centre, width) in viewers.WINDOWS.items():
        viewer.preset.value = name
        assert (viewer.preset.value, viewer.centre.value, viewer.width.value) == (name, centre, width)


def test_a_slider_that_meets_another_preset_still_redraws(study):
    viewer = viewers.SliceViewer(study.volume, window="lung")
    before = pixels(viewer)
    viewer.centre.value = 40  # the centre of "mediastinum", with the width of "lung"
    assert viewer.preset.value == "free" and "centre 40 HU, width 1500 HU" in viewer.caption.value
    assert (pixels(viewer) != before).any()


def test_a_free_window_is_not_bent_to_the_sliders(study):
    viewer = viewers.SliceViewer(study.volume, window=(2000, 6000))
    assert (viewer.centre.value, viewer.width.value, viewer.preset.value) == (2000, 6000, "free")


def test_soft_masks_are_kept_and_outlined_at_the_border(marked):
    mask = np.zeros(marked.shape)
    mask[10, :8] = 0.5
    shown, masks = viewers._checked(marked, {"m": mask})
    picture = np.asarray(viewers.render(shown, "axial", 10, mask=masks["m"], opacity=0.0, height=300))
    assert (picture[0, 20] == viewers.MASK_COLOUR).all()
    assert (picture[40, 200] != viewers.MASK_COLOUR).any()  # opacity 0: an outline only


def test_a_thin_slab_does_not_grow_without_end():
    slab = CTVolume(np.zeros((4, 100, 100), np.int16), (2.5, 1.0, 1.0))
    wide, tall = viewers.render(slab, "coronal", 5, height=300).size
    assert wide == 600 and tall == 60


def test_choosing_a_mask_goes_to_where_it_is_and_tints_it(study):
    viewer = viewers.SliceViewer(study.volume, study.masks)
    viewer.mask.value = "Lung nodule"
    assert study.masks["Lung nodule"][viewer.index.value].any()
    tinted = pixels(viewer).astype(int)
    assert ((tinted[..., 0] - tinted[..., 2]) > 60).any()  # orange somewhere; greys have none


def test_an_error_in_a_callback_is_shown(study):
    viewer = viewers.SliceViewer(study.volume)
    viewer.volume = None
    with pytest.raises(AttributeError):
        viewer.index.value = 3
    assert "AttributeError" in viewer.caption.value


def test_figures_and_export(study, tmp_path):
    viewer = viewers.SliceViewer(study.volume)
    assert Image.open(viewer.to_png(tmp_path / "slice.png")).size[1] == 440
    assert not list(tmp_path.glob("*.tmp"))
    assert len(viewers.montage(study.volume, n=6).axes) >= 6
    titles = [ax.get_title() for ax in viewers.finding_gallery([study, study], columns=2).axes]
    assert titles.count(next(iter(study.masks))) == 2


def test_bad_input_is_refused(study):
    with pytest.raises(TypeError, match="expected a CTVolume"):
        viewers.SliceViewer(study.volume.hu)
    with pytest.raises(ValueError, match=r"mask 'x' has shape \(2, 2, 2\), the volume \(32, 64, 64\)"):
        viewers.SliceViewer(study.volume, {"x": np.zeros((2, 2, 2))})
    with pytest.raises(ValueError, match="unknown window 'liver'; choose one of lung, mediastinum, bone"):
        viewers.SliceViewer(study.volume, window="liver")
    with pytest.raises(ValueError, match="unknown plane 'oblique'"):
        viewers.render(study.volume, "oblique", 0)
    with pytest.raises(IndexError, match="axial slice 32: the volume has slices 0 to 31"):
        viewers.render(study.volume, "axial", 32)
    with pytest.raises(ValueError, match="width must be above 0"):
        viewers.window(0, 40, 0)
    with pytest.raises(ValueError, match=r"window \(40.0, 0.0\): expected a finite centre and a width above 0"):
        viewers.SliceViewer(study.volume, window=(40, 0))
    with pytest.raises(ValueError, match=r"window \(1, 2, 3\): expected a preset name or \(centre, width\)"):
        viewers.window_of((1, 2, 3))
    with pytest.raises(ValueError, match=r"orientation IAR, expected SPL: pass volume.reoriented\(\)"):
        viewers.render(study.volume.reoriented("IAR"), "axial", 0)
    with pytest.raises(ValueError, match="montage of 0 slices"):
        viewers.montage(study.volume, n=0)
    with pytest.raises(ValueError, match="unknown plane 'oblique'"):
        viewers.montage(study.volume, "oblique")
    with pytest.raises(ValueError, match="no studies"):
        viewers.finding_gallery([])
    with pytest.raises(ValueError, match="study 1 has no finding"):
        viewers.finding_gallery([study, generate(1, findings=[])])


# --- training ---------------------------------------------------------------------------------------------


def some_rows(steps=30):
    rows = [{"step": 0, "score": 0.55, "seconds": 0.0}]
    for step in range(1, steps + 1):
        rows.append({"step": step, "contrastive": 3.4 - step / 50, "prompts": 0.6, "loss": 4.0, "seconds": step})
        if step % 10 == 0:
            rows[-1]["score"] = 0.55 + math.sin(step / 20) / 10
    return rows


def test_training_figure_shows_losses_scores_and_guessing():
    rows = some_rows()
    left, right = viewers.training_figure(pd.DataFrame(rows), batch_size=32).axes
    assert [line.get_label() for line in left.lines] == ["contrastive", "prompts", "guessing, ln 32"]
    assert left.lines[2].get_ydata()[0] == pytest.approx(math.log(32))
    assert right.lines[0].get_ydata() == pytest.approx([row["score"] for row in rows if "score" in row])
    assert right.lines[1].get_xdata()[0] == 30 and "0.650" in right.lines[1].get_label()
    first, _ = viewers.training_figure(pd.DataFrame(rows[:1])).axes  # before the first step
    assert not first.lines


def test_training_plot_updates_one_picture_and_ends_with_the_last_row(monkeypatch):
    import IPython

    shown = []

    class Handle:
        def update(self, picture):
            shown.append(picture)

    monkeypatch.setattr(IPython, "get_ipython", lambda: object())
    monkeypatch.setattr(IPython.display, "display", lambda picture, display_id: shown.append(picture) or Handle())
    plot = viewers.TrainingPlot(batch_size=32)
    monkeypatch.setattr(viewers.time, "perf_counter", lambda: float(len(plot.rows)))  # a second for each row
    for row in some_rows():
        plot(row)
    assert all(picture.data.startswith(b"\x89PNG") for picture in shown)
    assert len(plot.rows) == 31 == len(shown) and plot.history["step"].iloc[-1] == 30
    plot._cost = 1.0  # where a picture takes a second: one for each 20 rows, and for each score
    for row in some_rows()[1:10]:
        plot(row)
    assert len(shown) == 31
    plot(some_rows()[10])
    assert len(shown) == 32


def test_training_plot_outside_a_notebook_only_collects():
    plot = viewers.TrainingPlot()
    for row in some_rows():
        plot(row)
    assert len(plot.history) == 31
