"""The slice viewer: a CT in three linked planes in a notebook."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ipywidgets as w
import numpy as np
from PIL.Image import Image

from medctkit.common.atomic import replacing
from medctkit.scans.heat_map import HeatMap
from medctkit.scans.volumes import CTVolume
from medctkit.viewers.drawing.canvases import KINDS, MouseCanvas, PlainCanvas, kind_that_works
from medctkit.viewers.drawing.composition import Composition, Panel
from medctkit.viewers.drawing.hints import STEPS, ZOOMS, help_of, lines
from medctkit.viewers.drawing.linked_scans import LinkedScans, heat_maps_of
from medctkit.viewers.drawing.measuring import TOOLS, Ruler
from medctkit.viewers.drawing.messages import Messages
from medctkit.viewers.drawing.rendering import (
    COLOUR_MAPS,
    PLANES,
    SLABS,
    WINDOWS,
    Look,
    Voxel,
    Window,
    largest_slice,
    window_of,
)
from medctkit.viewers.drawing.stack_page import write_stack_page

ALL_PLANES = "three planes"


class SliceViewer:
    """Look through a volume in a notebook: axial, coronal and sagittal slices, linked by a crosshair.

    Sliders (or their arrow keys) do everything, also in Colab. Where ipympl is installed the picture hears the mouse
    and keys too, all of which "?" lists: slices by the wheel, window and level by the right button, zoom, distances in
    mm, HU of a region. Slices hang as radiologists hang them. The widget is `.widget`; `.messages` has what went wrong.

    A second volume is shown below, or beside it in a single plane, and moves along: by patient coordinates, or by the
    distance from the middle of each scan. `LinkedScans` says when; the lines under the picture say which.

    Args:
        volume: any orientation.
        masks: named arrays with the volume's shape, filled where they are not 0. Choosing one moves the crosshair to
            where most of it is.
        window: preset to start with, or (centre, width) in HU.
        height: of a row of planes, pixels; the first of three planes is 1.5 times as tall, a single one 1.8 times.
        other: a second volume to compare with.
        names: what to call the two volumes.
        heat_maps: named maps to lay over the volume; the first is shown.
        canvas: "ipympl", "plain", or None for what works here.
        folded: keep all controls but the first line folded away.

    Raises:
        TypeError: not a CTVolume, or not a HeatMap.
        ValueError: a mask of another shape, an unknown window or canvas, not two names.
    """

    def __init__(
        self,
        volume: CTVolume,
        masks: Mapping[str, np.ndarray] | None = None,
        window: Window = "lung",
        height: int = 340,
        *,
        other: CTVolume | None = None,
        names: Sequence[str] | None = None,
        heat_maps: Mapping[str, HeatMap] | None = None,
        canvas: str | None = None,
        folded: bool = False,
    ):
        if canvas not in (None, *KINDS):
            raise ValueError(f"unknown canvas {canvas!r}; choose one of {', '.join(KINDS)}, or None for what works")
        centre, width = window_of(window)
        linked, heat_maps = LinkedScans(volume, masks, other, names), heat_maps_of(heat_maps)
        self.height, self.messages = height, Messages()
        self._linked: Any  # of LinkedScans; None once closed, as the next
        self._composition: Any
        self._callbacks: list[Callable[[np.ndarray], None]] = []
        self._touched = "axial"
        self._cursor: tuple[float, float] | None = None
        self._start: np.ndarray | None = None  # of a measurement, RAS in mm
        kind = kind_that_works() if canvas is None else canvas
        self.canvas = PlainCanvas() if kind == "plain" else MouseCanvas(self._on_canvas)
        self._build(window if isinstance(window, str) else "free", round(centre), max(1, round(width)), folded)
        self._show_scans(linked, heat_maps)

    def _build(self, preset: str, centre: int, width: int, folded: bool) -> None:
        def slider(kind: Any, description: str, tooltip: str, **values: Any) -> Any:
            return kind(description=description, tooltip=tooltip, layout={"width": "280px"}, **values)

        dropdown: Any = partial(w.Dropdown, layout={"width": "210px"})
        self.view = w.ToggleButtons(
            options=[ALL_PLANES, *PLANES], tooltips=["axial large", *(f"{plane} only" for plane in PLANES)],
            style={"button_width": "auto"},
        )  # fmt: skip
        self.sliders = {name: slider(w.IntSlider, name, f"{name} slice", min=0, max=0) for name in PLANES}
        self.preset = dropdown(
            options=[*WINDOWS, "free"], value=preset, description="window", tooltip="HU that are seen"
        )
        self.centre = slider(w.IntSlider, "centre HU", "HU that are shown as middle grey", min=-1000, max=1000, step=10)
        self.width = slider(w.IntSlider, "width HU", "HU from black to white", min=10, max=4000, step=10)
        for control, value in ((self.centre, centre), (self.width, width)):  # they reach as far as what was asked for
            control.min, control.max, control.value = min(control.min, value), max(control.max, value), value
        self.crosshair = w.Checkbox(value=True, description="crosshair", indent=False, layout={"width": "110px"})
        self.mask_boxes: dict[str, w.Checkbox] = {}
        share: dict[str, Any] = {"min": 0, "max": 1, "step": 0.05}
        self.opacity = slider(w.FloatSlider, "mask tint", "opacity of the masks", value=0.35, **share)
        self.heat_map = w.Dropdown(options=["none"], description="heat map")
        self.heat_opacity = slider(w.FloatSlider, "map tint", "opacity where the map is highest", value=0.6, **share)
        self.colour_map = dropdown(options=COLOUR_MAPS, description="colours")
        self.zoom = slider(w.FloatSlider, "zoom", "around the crosshair", value=1, min=1, max=8, step=0.25)
        self.slab = dropdown(options=SLABS, description="slab", tooltip="of HU through several slices")
        self.thickness = slider(w.IntSlider, "slab mm", "thickness of the slab", value=10, min=2, max=60)
        self.tool = dropdown(options=TOOLS, description="mouse", tooltip="what a drag does")
        self.help = w.ToggleButton(description="?", tooltip="mouse and keys", layout={"width": "36px"})
        self._help = w.HTML(help_of(isinstance(self.canvas, MouseCanvas)), layout={"display": "none"})
        self.readout, self.hover = w.HTML(), w.HTML(lines(["? lists what mouse and keys do"]))
        w.dlink((self.help, "value"), (self._help.layout, "display"), lambda on: None if on else "none")
        for react, controls in (
            (self._moved, self.sliders.values()), (self._compose, [self.zoom]), (self._start_to_measure, [self.tool]),
            (self._arrange, [self.view]), (self._change_preset, [self.preset]),
            (self._change_window, [self.centre, self.width]),
            (self._draw, [self.crosshair, self.opacity, self.heat_map, self.heat_opacity, self.colour_map, self.slab]),
            (self._draw, [self.thickness]),
        ):  # fmt: skip
            for control in controls:
                self.messages.observe(control, react)

        wrapping = {"flex_flow": "row wrap", "align_items": "center"}
        rows: tuple[list[Any], ...] = (
            [self.view, self.crosshair, self.help], [*self.sliders.values()], [self.preset, self.centre, self.width],
            [self.slab, self.thickness, self.zoom, self.tool], [],
            [self.heat_map, self.heat_opacity, self.colour_map],
        )  # fmt: skip
        first, *boxes = [w.HBox(row, layout=wrapping) for row in rows]
        self._mask_row, self._heat_row = boxes[-2:]
        if folded:
            boxes = [w.Accordion([w.VBox(boxes)], titles=["slices, window, slab, zoom, measuring, masks"])]
        self.widget = w.VBox(
            [first, self._help, *boxes, self.canvas.widget, self.readout, self.hover, self.messages.widget]
        )

    # --- what is shown ------------------------------------------------------------------------------------

    def set_volume(
        self,
        volume: CTVolume,
        masks: Mapping[str, np.ndarray] | None = None,
        heat_maps: Mapping[str, HeatMap] | None = None,
        other: CTVolume | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        """Show another study, its crosshair in the middle; window, view and opacities stay, `on_move` is not told.

        Input is refused as by the class; then the old study stays.
        """
        self._show_scans(LinkedScans(volume, masks, other, names), heat_maps_of(heat_maps))

    def set_heat_maps(self, heat_maps: Mapping[str, HeatMap] | None) -> None:
        """Lay other maps over the volume, and show the first; opacity and colours stay.

        Raises:
            TypeError: not a HeatMap.
        """
        self._take_heat_maps(heat_maps_of(heat_maps))
        self._draw()

    def _show_scans(self, linked: LinkedScans, heat_maps: dict[str, HeatMap]) -> None:
        self._linked, self.scans = linked, linked.scans
        with self.messages.quietly():
            self.tool.value, self._start = TOOLS[0], None
            for slider, n in zip(self.sliders.values(), self.scans[0].volume.shape, strict=True):
                slider.max = n - 1
                slider.value = slider.max // 2
        for box in self.mask_boxes.values():
            box.close()
        self.mask_boxes = {
            name: w.Checkbox(description=name, indent=False, layout={"width": "auto", "margin": "0 1em 0 0"})
            for name in self.scans[0].masks
        }
        for name, box in self.mask_boxes.items():
            self.messages.observe(box, lambda name=name: self._choose_mask(name))
        label = w.Label("masks", layout={"margin": "0 1em 0 0"})
        self._mask_row.children = [label, *self.mask_boxes.values(), self.opacity]
        self._mask_row.layout.display = None if self.mask_boxes else "none"
        self._take_heat_maps(heat_maps)
        self._arrange()

    def _take_heat_maps(self, heat_maps: dict[str, HeatMap]) -> None:
        self.heat_maps = heat_maps
        with self.messages.quietly():
            self.heat_map.options = ["none", *heat_maps]
            self.heat_map.value = next(iter(heat_maps), "none")
        self._heat_row.layout.display = None if heat_maps else "none"

    @property
    def chosen_masks(self) -> tuple[str, ...]:
        """Names of the masks that are shown."""
        return tuple(name for name, box in self.mask_boxes.items() if box.value)

    @property
    def look(self) -> Look:
        """How the slices are drawn now."""
        window, heat_map = (self.centre.value, self.width.value), self.heat_maps.get(self.heat_map.value)
        tints = self.opacity.value, heat_map, self.heat_opacity.value
        return Look(window, self.chosen_masks, *tints, self.colour_map.value, self.slab.value, self.thickness.value)

    def picture(self) -> Image:
        """The picture now shown (PIL image, RGB)."""
        lines_too = self.crosshair.value and self._start is None  # they would lie over what is measured
        picture = self._composition.picture(self._linked.voxels(self.voxel), self.look, lines_too)
        if self.measurement is not None:
            self.measurement.draw(picture, self._composition.panels, self.scans[0])
        return picture

    @property
    def measurement(self) -> Ruler | None:
        """What is measured now, up to the crosshair: `.described(viewer.scans[0])` says it in words. None: nothing."""
        if self._start is None:
            return None
        start = self.scans[0].nearest(self.scans[0].voxel_of(self._start))
        return Ruler(self.tool.value, start, self.voxel, self._touched)

    # --- the crosshair ------------------------------------------------------------------------------------

    @property
    def voxel(self) -> Voxel:
        """The voxel (d, h, w) under the crosshair, of the volume in SPL orientation."""
        return self.sliders["axial"].value, self.sliders["coronal"].value, self.sliders["sagittal"].value

    @property
    def position(self) -> np.ndarray:
        """The middle of the voxel under the crosshair, patient coordinates (RAS) in mm."""
        return self.scans[0].point_of(self.voxel)

    def move_to(self, point: Sequence[float]) -> None:
        """Move the crosshair to the voxel that is nearest to a point in the patient (RAS, mm).

        Raises:
            ValueError: not three finite numbers.
        """
        place = np.asarray(point, float)
        if place.shape != (3,) or not np.isfinite(place).all():
            raise ValueError(f"point {place.tolist()}: expected three finite patient coordinates (RAS) in mm")
        self._go_to(self.scans[0].nearest(self.scans[0].voxel_of(place)))

    def on_move(self, callback: Callable[[np.ndarray], None]) -> None:
        """Have a function called with the new position (RAS, mm) after every move of the crosshair."""
        self._callbacks.append(callback)

    def _go_to(self, voxel: Voxel) -> None:
        """Move to a voxel of the first scan, draw and tell, unless the crosshair is there already."""
        if voxel != self.voxel:
            with self.messages.quietly():
                for slider, index in zip(self.sliders.values(), voxel, strict=True):
                    slider.value = index
            self.messages.guarded(self._moved)()

    def _moved(self) -> None:
        self._draw()
        for callback in self._callbacks:
            callback(self.position)

    # --- reactions ----------------------------------------------------------------------------------------

    def _arrange(self) -> None:
        self._planes = tuple(PLANES) if self.view.value == ALL_PLANES else (self.view.value,)
        self._touched = self._planes[0]
        self._compose()

    def _compose(self) -> None:
        voxels = self._linked.voxels(self.voxel)
        self._composition = Composition(self.scans, self._planes, self.height, self.zoom.value, voxels)
        self._draw()

    def _start_to_measure(self) -> None:
        """From where the crosshair is."""
        self._start = None if self.tool.value == TOOLS[0] else self.position
        self._draw()

    def _change_preset(self) -> None:
        if self.preset.value != "free":
            with self.messages.quietly():
                self.centre.value, self.width.value = WINDOWS[self.preset.value]
        self._draw()

    def _change_window(self) -> None:
        with self.messages.quietly():
            self.preset.value = "free"
        self._draw()

    def _choose_mask(self, name: str) -> None:
        mask = self.scans[0].masks[name]
        if self.mask_boxes[name].value and mask.any():
            index = largest_slice(mask)  # where there is most of it
            row, column = (int(np.median(where)) for where in np.nonzero(mask[index]))
            self._go_to((index, row, column))
        self._draw()

    def _on_canvas(self, what: str, x: float, y: float, more: Any) -> None:
        self.messages.guarded(lambda: getattr(self, f"_{what}")(x, y, more), keep=what == "hover")()

    def _under(self, x: float, y: float) -> tuple[Panel, Voxel] | None:
        """The panel at a place of the picture, and the voxel of its scan."""
        panel = self._composition.panel_at(x, y)
        if panel is None:
            return None
        return panel, panel.voxel(x, y, self._linked.voxels(self.voxel)[panel.scan][PLANES[panel.plane]])

    def _press(self, x: float, y: float, _: None) -> None:
        self._drag(x, y, None, begins=self._start is not None)

    def _drag(self, x: float, y: float, _: None, begins: bool = False) -> None:
        if found := self._under(x, y):
            voxel = self._linked.in_first(found[0].scan, found[1])
            if begins:  # a measurement
                self._start = self.scans[0].point_of(voxel)
            self._touched = found[0].plane
            self._go_to(voxel)

    def _level(self, x: float, y: float, by: tuple[float, float]) -> None:
        step = max(1.0, self.width.value / 250)
        with self.messages.quietly():
            self.width.value += round(step * by[0])
            self.centre.value += round(step * by[1])
        self._change_window()

    def _zoom(self, x: float, y: float, step: int) -> None:
        self.zoom.value *= 1.5**step

    def _scroll(self, x: float, y: float, step: int) -> None:
        if found := self._under(x, y):
            self._touched = found[0].plane
            self._step(step)

    def _step(self, step: int) -> None:
        slider = self.sliders[self._touched]
        slider.value = min(max(slider.value + step, 0), slider.max)

    def _hover(self, x: float, y: float, _: None) -> None:
        self._cursor = x, y
        if found := self._under(x, y):
            panel, voxel = found
            self.hover.value = lines([f"under the cursor: {self.scans[panel.scan].described(voxel)}"])

    def _key(self, x: float, y: float, key: str) -> None:
        if key in STEPS:
            self._step(STEPS[key])
        elif key in ZOOMS:
            self.zoom.value *= ZOOMS[key]
        elif key in ("1", "2", "3"):
            self.preset.value = [*WINDOWS][int(key) - 1]
        elif key in ("x", "d", "r"):
            self.tool.value = TOOLS["xdr".index(key)]
        elif key == "s":
            self.slab.index = (self.slab.index + 1) % len(SLABS)
        elif key in ("c", "?"):
            box = self.crosshair if key == "c" else self.help
            box.value = not box.value
        elif key == "m":
            on = not self.chosen_masks
            with self.messages.quietly():
                for box in self.mask_boxes.values():
                    box.value = on
            self._draw()

    def _draw(self) -> None:
        voxels = self._linked.voxels(self.voxel)
        if self.zoom.value > 1 and not self._composition.shows(voxels):
            self._compose()  # follow the crosshair, which draws
            return
        self.canvas.show(self.picture())
        first = self.scans[0]
        slices = ", ".join(f"{plane} {slider.value} of 0 to {slider.max}" for plane, slider in self.sliders.items())
        inside = [name for name in self.chosen_masks if first.masks[name][self.voxel]]
        look = f"window centre {self.centre.value} HU, width {self.width.value} HU"
        if self.slab.value != SLABS[0]:
            look += f" · {self.slab.value} of {self.thickness.value} mm"
        said = [slices, first.described(self.voxel) + (f" · inside of {', '.join(inside)}" if inside else ""), look]
        if (heat_map := self.look.heat_map) is not None:
            value = float(heat_map.at(self.position[None])[0])
            said.append(f"{heat_map.name}: {'does not reach this place' if np.isnan(value) else f'{value:.3g}'}")
        said += self._linked.described(self.voxel)
        said.append("" if self.measurement is None else self.measurement.described(first))
        self.readout.value = lines(said)
        if self._cursor is not None:  # another slice lies under it now
            self._hover(*self._cursor, None)

    # --- keeping ------------------------------------------------------------------------------------------

    def to_png(self, path: str | os.PathLike) -> Path:
        """Save the picture now shown; written whole or not at all."""
        path = Path(path).expanduser()
        with replacing(path) as temporary:
            self.picture().save(temporary, format="png")
        return path

    def to_html(self, path: str | os.PathLike, plane: str = "axial", title: str | None = None) -> Path:
        """Save a plane's whole stack as one HTML file that works without a kernel: see `write_stack_page`.

        It has the window, masks and heat map that are shown now, and a second window to switch to; two volumes lie
        beside each other. Its heading is the title, or the volumes' names.
        """
        second = "mediastinum" if self.preset.value == "lung" else "lung"
        windows = {self.preset.value: self.look.window, second: WINDOWS[second]}
        title = title or " and ".join(scan.name for scan in self.scans) or "CT"
        return write_stack_page(path, self._linked, plane, windows, self.look, title)

    def close(self) -> None:
        """Remove the widget, and let go of the volumes."""
        self.canvas.close()
        close_with_children(self.widget)
        self.scans, self.heat_maps, self._callbacks = (), {}, []
        self._linked = self._composition = None

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        return self.widget._repr_mimebundle_(**kwargs)


def close_with_children(widget: Any) -> None:
    """Close a widget and all in it: ipywidgets keeps each control until then, and a control keeps whom it tells."""
    for child in getattr(widget, "children", ()):
        close_with_children(child)
    widget.close()
