"""Looking at CT: windows, slices in radiological orientation, masks, and a slice viewer for notebooks.

Rendering is plain functions from a volume to a picture; the widget around it only chooses what to render.
Slices are shown as radiologists hang them: axial from below, so that the patient's right is on the left of
the picture; coronal from the front; sagittal with the front on the left.
"""

import html
import io
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medctkit.atomic import replacing
from medctkit.volumes import CTVolume

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from medctkit.phantom import PhantomStudy

WINDOWS = {"lung": (-600, 1500), "mediastinum": (40, 400), "bone": (400, 1800)}  # centre and width, HU
PLANES = {"axial": 0, "coronal": 1, "sagittal": 2}
MARKS = {"axial": ("R", "L", "A", "P"), "coronal": ("R", "L", "S", "I"), "sagittal": ("A", "P", "S", "I")}
MASK_COLOUR = (230, 159, 0)  # orange, told apart from grey by colour-blind people too


def window(hu, centre: float, width: float) -> np.ndarray:
    """Grey values in [0, 1] of Hounsfield units seen through a window.

    Raises:
        ValueError: a width that is not above 0.
    """
    if not width > 0:
        raise ValueError(f"window width must be above 0 HU, got {width}")
    return np.clip((np.asarray(hu, dtype=np.float32) - centre) / width + 0.5, 0.0, 1.0)


def window_of(name_or_pair) -> tuple[float, float]:
    """Centre and width of a preset ("lung", "mediastinum", "bone") or of a (centre, width) pair."""
    if isinstance(name_or_pair, str):
        if name_or_pair not in WINDOWS:
            raise ValueError(f"unknown window {name_or_pair!r}; choose one of {', '.join(WINDOWS)} or (centre, width)")
        return WINDOWS[name_or_pair]
    if len(name_or_pair) != 2:
        raise ValueError(f"window {tuple(name_or_pair)}: expected a preset name or (centre, width) in HU")
    centre, width = map(float, name_or_pair)
    if not (np.isfinite(centre) and np.isfinite(width) and width > 0):
        raise ValueError(f"window {(centre, width)}: expected a finite centre and a width above 0, both in HU")
    return centre, width


def slice_of(array: np.ndarray, plane: str, index: int) -> np.ndarray:
    """One slice (rows, columns) of an array (d, h, w) in SPL orientation, as it is hung.

    Raises:
        ValueError: unknown plane.
        IndexError: no such slice.
    """
    if plane not in PLANES:
        raise ValueError(f"unknown plane {plane!r}; choose one of {', '.join(PLANES)}")
    axis = PLANES[plane]
    if not 0 <= index < array.shape[axis]:
        raise IndexError(f"{plane} slice {index}: the volume has slices 0 to {array.shape[axis] - 1}")
    cut = np.take(array, index, axis=axis)
    return cut if plane == "axial" else cut[::-1]  # head up


def pixel_size(volume: CTVolume, plane: str) -> tuple[float, float]:
    """Height and width of a pixel of a slice, mm."""
    return tuple(s for axis, s in enumerate(volume.spacing) if axis != PLANES[plane])


def _checked(volume: CTVolume, masks: Mapping[str, np.ndarray] | None):
    """Volume and masks in SPL orientation, or an error that says what does not fit."""
    if not isinstance(volume, CTVolume):
        raise TypeError(f"expected a CTVolume, as read_volume(path) gives it, got {type(volume).__name__}")
    canonical = volume.reoriented()
    turned = {}
    for name, mask in (masks or {}).items():
        if np.shape(mask) != volume.hu.shape:
            raise ValueError(
                f"mask {name!r} has shape {np.shape(mask)}, the volume {volume.hu.shape}: they must be the same"
            )
        filled = (np.asarray(mask) != 0).astype(np.uint8)  # soft masks too: 0.5 is not nothing
        as_volume = CTVolume(filled, volume.spacing, volume.orientation, volume.affine)
        turned[name] = as_volume.reoriented().hu > 0
    return canonical, turned


def render(
    volume: CTVolume, plane: str, index: int, window="lung", mask=None, opacity: float = 0.35, height: int = 480
):
    """A slice as a picture (PIL image, RGB), with orientation marks and the right aspect ratio.

    Args:
        volume: in SPL orientation.
        plane: "axial", "coronal" or "sagittal".
        index: slice along the plane's axis.
        window: preset name or (centre, width) in HU.
        mask: boolean (d, h, w), tinted and outlined.
        opacity: of the tint, 0 to 1.
        height: of the picture, pixels; less where the slice is more than twice as wide as it is tall.

    Raises:
        ValueError: a volume in another orientation (its marks would be wrong), unknown plane or window.
        IndexError: no such slice.
    """
    from PIL import Image, ImageDraw, ImageFont

    if volume.orientation != "SPL":
        raise ValueError(f"volume in orientation {volume.orientation}, expected SPL: pass volume.reoriented()")
    grey = (255 * window_grey(slice_of(volume.hu, plane, index), window)).astype(np.uint8)
    tall, wide = (n * s for n, s in zip(grey.shape, pixel_size(volume, plane), strict=True))
    scale = min(height / tall, 2 * height / wide)  # pixels per mm; a thin slab must not fill metres
    size = (max(1, round(scale * wide)), max(1, round(scale * tall)))
    picture = Image.fromarray(grey).resize(size, Image.Resampling.BILINEAR).convert("RGB")
    if mask is not None:
        filled = Image.fromarray(slice_of(mask, plane, index).astype(np.uint8) * 255)
        inside = np.asarray(filled.resize(size, Image.Resampling.NEAREST)) > 127
        around = np.pad(inside, 1)  # a mask that leaves the picture is outlined there too
        edge = inside & ~(around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:])
        strength = (255 * opacity * inside).astype(np.uint8)
        strength[edge] = 255
        picture.paste(MASK_COLOUR, (0, 0, *size), Image.fromarray(strength))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=15)
    left, right, top, bottom = MARKS[plane]
    middle = (size[0] / 2, size[1] / 2)
    for text, at, anchor in (
        (left, (6, middle[1]), "lm"), (right, (size[0] - 6, middle[1]), "rm"),
        (top, (middle[0], 4), "mt"), (bottom, (middle[0], size[1] - 4), "mb"),
    ):  # fmt: skip
        draw.text(at, text, (150, 200, 255), font, anchor, stroke_width=2, stroke_fill=(0, 0, 0))
    return picture


def window_grey(hu: np.ndarray, chosen) -> np.ndarray:
    """Grey values in [0, 1] through a preset or a (centre, width) pair."""
    return window(hu, *window_of(chosen))


class SliceViewer:
    """Scroll through a volume in a notebook.

    Slider (or its arrow keys), plane, window presets and free centre and width, one mask at a time. Works in
    JupyterLab and Colab; the first picture also shows in exported HTML. The widget is `.widget`.

    Args:
        volume: any orientation; it is shown in radiological orientation.
        masks: named boolean arrays with the volume's shape.
        window: preset to start with.
        height: of the picture, pixels.

    Raises:
        TypeError: not a CTVolume.
        ValueError: a mask of another shape, an unknown window.
    """

    def __init__(
        self, volume: CTVolume, masks: Mapping[str, np.ndarray] | None = None, window="lung", height: int = 440
    ):
        import ipywidgets as w

        self.volume, self.masks = _checked(volume, masks)
        self.height = height
        centre, width = window_of(window)
        preset = window if isinstance(window, str) else "free"
        self.plane = w.ToggleButtons(options=list(PLANES), value="axial", style={"button_width": "80px"})
        self.index = w.IntSlider(min=0, max=1, description="slice", continuous_update=True, layout={"width": "430px"})
        self.preset = w.Dropdown(options=[*WINDOWS, "free"], value=preset, description="window")
        centre, width = round(centre), max(1, round(width))  # the sliders reach as far as what was asked for
        ends = {"min": min(-1000, centre), "max": max(1000, centre)}
        self.centre = w.IntSlider(value=centre, step=10, description="centre HU", **ends)
        ends = {"min": min(10, width), "max": max(4000, width)}
        self.width = w.IntSlider(value=width, step=10, description="width HU", **ends)
        self._setting_preset = False
        self.mask = w.Dropdown(options=["none", *self.masks], value="none", description="mask")
        self.opacity = w.FloatSlider(min=0, max=1, step=0.05, value=0.35, description="opacity")
        self.image = w.Image(format="png", layout={"align_self": "flex-start", "max_width": "100%"})  # not stretched
        self.caption = w.HTML()
        self._place_slider()
        for control, react in (
            (self.plane, self._change_plane), (self.preset, self._change_preset),
            (self.centre, self._change_window), (self.width, self._change_window),
            (self.index, self._draw), (self.mask, self._show_mask), (self.opacity, self._draw),
        ):  # fmt: skip
            control.observe(self._guarded(react), names="value")
        rows = [w.HBox([self.plane]), self.index, w.HBox([self.preset, self.mask]), w.HBox([self.centre, self.width])]
        rows += [self.opacity] if self.masks else []
        self.widget = w.VBox([*rows, self.image, self.caption])
        self._draw()

    def _guarded(self, react):
        """An error in a callback is shown under the picture; it never vanishes."""

        def call(change):
            try:
                react()
            except Exception as error:
                self.caption.value = f"<b style='color:#D55E00'>{html.escape(f'{type(error).__name__}: {error}')}</b>"
                raise

        return call

    def _place_slider(self):
        last = self.volume.hu.shape[PLANES[self.plane.value]] - 1
        self.index.max = last
        self.index.value = last // 2

    def _change_plane(self):
        self._place_slider()
        self._draw()

    def _change_preset(self):
        if self.preset.value != "free":
            self._setting_preset = True  # the two sliders move one after the other
            try:
                self.centre.value, self.width.value = WINDOWS[self.preset.value]
            finally:
                self._setting_preset = False
        self._draw()

    def _change_window(self):
        if self._setting_preset:
            return
        if self.preset.value != "free":
            self.preset.value = "free"  # draws
        else:
            self._draw()

    def _show_mask(self):
        if self.mask.value != "none":
            area = self.masks[self.mask.value].sum(axis=tuple({0, 1, 2} - {PLANES[self.plane.value]}))
            self.index.value = int(area.argmax())  # where there is most of it
        self._draw()

    def picture(self):
        """The picture now shown (PIL image)."""
        mask = self.masks.get(self.mask.value)
        chosen = (self.centre.value, self.width.value)
        return render(self.volume, self.plane.value, self.index.value, chosen, mask, self.opacity.value, self.height)

    def _draw(self):
        buffer = io.BytesIO()
        self.picture().save(buffer, format="png", compress_level=1)
        self.image.value = buffer.getvalue()
        axis = PLANES[self.plane.value]
        position = (self.index.value - (self.volume.hu.shape[axis] - 1) / 2) * self.volume.spacing[axis]
        side = ("Superior", "Posterior", "Left")[axis]
        self.caption.value = (
            f"{self.plane.value} slice {self.index.value}, {position:+.0f} mm towards {side} from the middle; "
            f"window centre {self.centre.value} HU, width {self.width.value} HU"
        )

    def to_png(self, path: str | os.PathLike) -> Path:
        """Save the picture now shown; written whole or not at all."""
        path = Path(path)
        with replacing(path) as temporary:
            self.picture().save(temporary, format="png")
        return path

    def _repr_mimebundle_(self, **kwargs):
        return self.widget._repr_mimebundle_(**kwargs)


def largest_slice(mask: np.ndarray, plane: str = "axial") -> int:
    """Index of the slice with most of a mask (d, h, w)."""
    return int(np.asarray(mask).sum(axis=tuple({0, 1, 2} - {PLANES[plane]})).argmax())


def montage(volume: CTVolume, plane: str = "axial", window="lung", n: int = 12, columns: int = 6) -> "Figure":
    """N slices, evenly spaced, as one figure."""
    import matplotlib.pyplot as plt

    if n < 1 or columns < 1:
        raise ValueError(f"montage of {n} slices in {columns} columns: both must be at least 1")
    if plane not in PLANES:
        raise ValueError(f"unknown plane {plane!r}; choose one of {', '.join(PLANES)}")
    canonical, _ = _checked(volume, None)
    last = canonical.hu.shape[PLANES[plane]] - 1
    chosen = np.linspace(0.08 * last, 0.92 * last, n).round().astype(int)
    rows = -(-n // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.2 * columns, 2.4 * rows), facecolor="black", squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for ax, index in zip(axes.flat, chosen, strict=False):
        ax.imshow(render(canonical, plane, int(index), window, height=260))
        ax.set_title(f"{plane} {index}", color="white", fontsize=8)
    figure.tight_layout(pad=0.4)
    return figure


def finding_gallery(studies: Sequence["PhantomStudy"], columns: int = 6) -> "Figure":
    """Each study's first finding, cut where its mask is largest: lung window above, mediastinal window below."""
    import matplotlib.pyplot as plt

    if not studies:
        raise ValueError("no studies: a gallery shows at least one")
    for i, study in enumerate(studies):
        if not study.masks:
            raise ValueError(f"study {i} has no finding, so nothing to cut through; leave it out")
    rows = -(-len(studies) // columns)
    figure, axes = plt.subplots(
        2 * rows, columns, figsize=(2.5 * columns, 4.7 * rows), facecolor="black", squeeze=False
    )
    for ax in axes.flat:
        ax.axis("off")
    for i, study in enumerate(studies):
        name, mask = next(iter(study.masks.items()))
        canonical, masks = _checked(study.volume, {name: mask})
        index = largest_slice(masks[name])
        for j, preset in enumerate(("lung", "mediastinum")):
            ax = axes[2 * (i // columns) + j, i % columns]
            outlined = masks[name] if j == 1 else None
            ax.imshow(render(canonical, "axial", index, preset, outlined, opacity=0.0, height=300))
            ax.set_title(name if j == 0 else "", color="white", fontsize=9)
    figure.tight_layout(pad=0.4)
    return figure


def training_figure(history: "pd.DataFrame", batch_size: int | None = None) -> "Figure":
    """Losses and validation AUROC over the steps of a fine-tuning run.

    Args:
        history: as `FineTuneResult` has it: step, contrastive, prompts, score; loss columns may be missing.
        batch_size: draws the contrastive loss of pure guessing, ln(batch_size), too.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="tight")
    left, right = figure.subplots(1, 2)
    for name, colour in (("contrastive", "#0072B2"), ("prompts", "#D55E00")):
        if name in history:
            left.plot(history["step"], history[name].rolling(10, min_periods=1).mean(), color=colour, label=name)
    if "contrastive" in history and batch_size:
        left.axhline(math.log(batch_size), color="#0072B2", ls=":", label=f"guessing, ln {batch_size}")
    left.set(xlabel="step", ylabel="loss (mean of 10 steps)", title="training loss")
    if left.lines:
        left.legend()
    scored = history.dropna(subset=["score"])
    best = scored.loc[scored["score"].idxmax()]
    right.plot(scored["step"], scored["score"], "o-", color="#009E73", label="mean AUROC, zero-shot")
    right.axvline(best["step"], color="grey", ls="--", label=f"best so far: {best['score']:.3f}")
    right.set(xlabel="step", ylabel="mean AUROC, zero-shot", title="validation patients")
    right.legend()
    return figure


class TrainingPlot:
    """Losses and validation AUROC, drawn anew in a notebook while a model trains: the `callback` of `finetune`.

    Outside a notebook it only collects the rows; `training_figure(plot.history)` draws them.

    Args:
        batch_size: see `training_figure`.
    """

    def __init__(self, batch_size: int | None = None):
        self.batch_size, self.rows = batch_size, []
        self._shown, self._drawn, self._cost = None, 0.0, 0.0

    @property
    def history(self) -> "pd.DataFrame":
        """The rows so far."""
        import pandas as pd

        return pd.DataFrame(self.rows)

    def __call__(self, row: Mapping[str, float]) -> None:
        """Take a row; draw if it has a score, else at most a twentieth of the time."""
        from IPython import get_ipython

        self.rows.append(dict(row))
        due = "score" in row or time.perf_counter() - self._drawn > 20 * self._cost
        if due and get_ipython() is not None:
            self._draw()

    def _draw(self) -> None:
        from IPython.display import Image, display

        started, buffer = time.perf_counter(), io.BytesIO()
        training_figure(self.history, self.batch_size).savefig(buffer, format="png", dpi=80)
        picture = Image(buffer.getvalue(), alt="training loss, and AUROC on validation patients, by step")
        if self._shown is None:
            self._shown = display(picture, display_id=True)
        else:
            self._shown.update(picture)
        self._drawn = time.perf_counter()
        self._cost = self._drawn - started
