"""Several slices as one picture: three planes beside each other, two scans, a crosshair, a legend.

A `Composition` also knows which voxel lies under which pixel, so that a click means a place in the patient.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from medctkit.viewers.drawing.rendering import (
    PLANES,
    Look,
    Scan,
    Voxel,
    colour_table,
    draw_marks,
    draw_slice,
    font,
    mask_colours,
    pixel_size,
)

if TYPE_CHECKING:
    from PIL.Image import Image

GAP = 6  # pixels between panels
WIDEST = 2.35  # heights: how wide a row of panels may be; 360 pixels fit JupyterLab on a small screen
LARGE = 1.5  # heights: a single plane
CROSSHAIR = (240, 228, 66)
_HOLE = 9  # pixels: the crosshair leaves its middle free, so that what it points at can be seen
_MARKS = 22  # pixels at the edges that the crosshair leaves to the orientation marks
_GROUND = (50, 50, 50)  # between panels; no slice is there
_LINE = 22  # pixels: a line of the legend


@dataclass(frozen=True)
class Panel:
    """Where a slice lies in the picture.

    Attributes:
        scan: 0, or 1 for the second of two scans.
        plane: "axial", "coronal" or "sagittal".
        left: first column of pixels.
        top: first row of pixels.
        size: width and height in pixels.
        shape: of the scan, voxels (d, h, w).
    """

    scan: int
    plane: str
    left: int
    top: int
    size: tuple[int, int]
    shape: Voxel

    def holds(self, x: float, y: float) -> bool:
        """Does a place of the picture, in pixels from its upper left corner, lie in this panel?"""
        return 0 <= x - self.left < self.size[0] and 0 <= y - self.top < self.size[1]

    def voxel(self, x: float, y: float, index: int) -> Voxel:
        """The voxel (d, h, w) under a place of the picture, where the panel shows slice `index`."""
        row_axis, column_axis = (axis for axis in range(3) if axis != PLANES[self.plane])
        column = int((x - self.left) / self.size[0] * self.shape[column_axis])
        row = int((y - self.top) / self.size[1] * self.shape[row_axis])
        found = [index] * 3
        found[column_axis] = column
        found[row_axis] = row if self.plane == "axial" else self.shape[row_axis] - 1 - row  # head up
        return found[0], found[1], found[2]

    def place(self, voxel: Sequence[float]) -> tuple[float, float]:
        """Where in the picture the middle of a voxel (d, h, w) lies, pixels."""
        row_axis, column_axis = (axis for axis in range(3) if axis != PLANES[self.plane])
        row, rows = voxel[row_axis], self.shape[row_axis]
        row = row if self.plane == "axial" else rows - 1 - row
        return (
            self.left + (voxel[column_axis] + 0.5) / self.shape[column_axis] * self.size[0],
            self.top + (row + 0.5) / rows * self.size[1],
        )


class Composition:
    """The slices of one or two scans in one picture, all at the same scale.

    Three planes of a scan make a row, and a second scan a second row; a single plane is larger, and two scans lie side
    by side. The slices that were drawn last are kept, one for each panel, so that only what changed is drawn again.

    Args:
        scans: one or two.
        planes: which to show.
        height: of a panel, in pixels; less where a row would be more than 2.35 times as wide.
    """

    def __init__(self, scans: Sequence[Scan], planes: Sequence[str] = tuple(PLANES), height: int = 360):
        self.scans, self.planes = tuple(scans), tuple(planes)
        self.panels, self.size = _arranged(self.scans, self.planes, height)
        self._drawn: dict[Panel, tuple[Any, Image]] = {}

    def panel_at(self, x: float, y: float) -> Panel | None:
        """The panel at a place of the picture, pixels from its upper left corner."""
        return next((panel for panel in self.panels if panel.holds(x, y)), None)

    def picture(self, voxels: Sequence[Voxel], look: Look, crosshair: bool = True) -> "Image":
        """The picture (PIL image, RGB).

        Args:
            voxels: for each scan the voxel (d, h, w) that the slices go through.
            look: how to draw; masks and heat map are those of the first scan.
            crosshair: mark the voxel in each slice.
        """
        from PIL import Image

        legend = _legend(look, self.scans[0], self.size[0])
        wide, tall = self.size
        picture = Image.new("RGB", (wide, tall + (legend.size[1] if legend else 0)), _GROUND)
        for panel in self.panels:
            voxel = voxels[panel.scan]
            picture.paste(self._slice(panel, voxel[PLANES[panel.plane]], look), (panel.left, panel.top))
            if crosshair:
                _draw_crosshair(picture, panel, voxel)
        if legend:
            picture.paste(legend, (0, tall))
        return picture

    def _slice(self, panel: Panel, index: int, look: Look) -> "Image":
        scan = self.scans[panel.scan]
        if panel.scan:
            look = Look(look.window)
        if self._drawn.get(panel, (None,))[0] != (index, look):
            picture = draw_slice(scan, panel.plane, index, panel.size, look)
            draw_marks(picture, panel.plane, f"{panel.plane} {index}", scan.name)
            self._drawn[panel] = ((index, look), picture)
        return self._drawn[panel][1]


def _arranged(scans: Sequence[Scan], planes: Sequence[str], height: int) -> tuple[tuple[Panel, ...], tuple[int, int]]:
    """Panels, and width and height of them all."""
    rows = [[(i, plane) for i in range(len(scans))] for plane in planes]
    if len(planes) > 1:
        rows = [[(i, plane) for plane in planes] for i in range(len(scans))]
    millimetres = {}
    for i, plane in (cell for row in rows for cell in row):
        steps = pixel_size(scans[i].volume, plane)
        counts = [n for axis, n in enumerate(scans[i].volume.shape) if axis != PLANES[plane]]
        millimetres[i, plane] = tuple(n * step for n, step in zip(counts, steps, strict=True))
    tallest = max(tall for tall, _ in millimetres.values())
    widest = max(sum(millimetres[cell][1] for cell in row) for row in rows)
    scale = min(height * (LARGE if len(planes) == 1 else 1) / tallest, WIDEST * height / widest)  # pixels per mm
    panels, top, right = [], 0, 0
    for row in rows:
        left, below = 0, top
        for i, plane in row:
            tall, wide = (max(1, round(scale * length)) for length in millimetres[i, plane])
            panels.append(Panel(i, plane, left, top, (wide, tall), scans[i].volume.shape))
            left, below = left + wide + GAP, max(below, top + tall)
        top, right = below + GAP, max(right, left - GAP)
    return tuple(panels), (right, top - GAP)


def _draw_crosshair(picture: "Image", panel: Panel, voxel: Voxel) -> None:
    from PIL import ImageDraw

    draw, (x, y) = ImageDraw.Draw(picture), map(round, panel.place(voxel))
    left, top = panel.left + _MARKS, panel.top + _MARKS
    right, bottom = panel.left + panel.size[0] - 1 - _MARKS, panel.top + panel.size[1] - 1 - _MARKS
    for ends in ((left, x - _HOLE), (x + _HOLE, right)):
        if ends[0] <= ends[1]:
            draw.line([(ends[0], y), (ends[1], y)], CROSSHAIR)
    for ends in ((top, y - _HOLE), (y + _HOLE, bottom)):
        if ends[0] <= ends[1]:
            draw.line([(x, ends[0]), (x, ends[1])], CROSSHAIR)


def _legend(look: Look, scan: Scan, width: int) -> "Image | None":
    """The heat map's colours with their limits and the masks' colours, as a picture; None where there is neither."""
    from PIL import Image, ImageDraw

    written, entries = font(12), []
    if look.heat_map is not None:
        low, high = look.heat_map.limits
        bar = Image.fromarray(colour_table(look.colour_map)[None, ::-2][:, ::-1]).resize((128, 12))
        entries.append((bar, f"{look.heat_map.name}, {low:.3g} to {high:.3g}"))
    colours = mask_colours([*scan.masks])
    entries += [(Image.new("RGB", (12, 12), colours[name]), name) for name in look.masks]
    if not entries:
        return None
    placed, x, line = [], 6, 0
    for swatch, text in entries:
        long = swatch.size[0] + 6 + written.getlength(text) + 16
        if x > 6 and x + long > width:
            x, line = 6, line + 1
        placed.append((x, line * _LINE + 5, swatch, text))
        x += round(long)
    legend = Image.new("RGB", (width, (line + 1) * _LINE))
    draw = ImageDraw.Draw(legend)
    for x, y, swatch, text in placed:
        legend.paste(swatch, (x, y))
        draw.text((x + swatch.size[0] + 6, y + 6), text, (255, 255, 255), written, "lm")
    return legend
