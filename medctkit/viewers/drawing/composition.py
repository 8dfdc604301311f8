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
    in_pixels,
    slice_mm,
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

    @property
    def axes(self) -> tuple[int, int]:
        """Of (d, h, w) those along the rows' and the columns' numbers."""
        row, column = (axis for axis in range(3) if axis != PLANES[self.plane])
        return row, column

    def voxel(self, x: float, y: float, index: int) -> Voxel:
        """The voxel (d, h, w) under a place of the picture, where the panel shows slice `index`."""
        (row, column), found = self.axes, [index] * 3
        found[column] = int((x - self.left) / self.size[0] * self.shape[column])
        found[row] = int((y - self.top) / self.size[1] * self.shape[row])
        if self.plane != "axial":  # head up
            found[row] = self.shape[row] - 1 - found[row]
        return found[0], found[1], found[2]

    def place(self, voxel: Voxel) -> tuple[float, float]:
        """Where in the picture the middle of a voxel (d, h, w) lies, pixels."""
        row, column = self.axes
        across, down = (voxel[column] + 0.5) / self.shape[column], (voxel[row] + 0.5) / self.shape[row]
        down = down if self.plane == "axial" else 1 - down
        return self.left + across * self.size[0], self.top + down * self.size[1]


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
        self.scans = tuple(scans)
        self.panels, self.size = _arranged(self.scans, tuple(planes), height)
        self._drawn: dict[Panel, tuple[Any, Image]] = {}

    def panel_at(self, x: float, y: float) -> Panel | None:
        """The panel at a place of the picture, pixels from its upper left corner."""
        for panel in self.panels:
            if 0 <= x - panel.left < panel.size[0] and 0 <= y - panel.top < panel.size[1]:
                return panel
        return None

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
    rows = [[(i, plane) for plane in planes] for i in range(len(scans))]
    if len(planes) == 1:
        rows = [[(i, planes[0]) for i in range(len(scans))]]
    millimetres = {(i, plane): slice_mm(scans[i].volume, plane) for row in rows for i, plane in row}
    tallest = max(tall for _, tall in millimetres.values())
    widest = max(sum(millimetres[cell][0] for cell in row) for row in rows)
    scale = min(height * (LARGE if len(planes) == 1 else 1) / tallest, WIDEST * height / widest)  # pixels per mm
    panels, top, right = [], 0, 0
    for row in rows:
        left, below = 0, top
        for i, plane in row:
            size = in_pixels(millimetres[i, plane], scale)
            panels.append(Panel(i, plane, left, top, size, scans[i].volume.shape))
            left, below = left + size[0] + GAP, max(below, top + size[1])
        top, right = below + GAP, max(right, left - GAP)
    return tuple(panels), (right, top - GAP)


def _draw_crosshair(picture: "Image", panel: Panel, voxel: Voxel) -> None:
    from PIL import ImageDraw

    draw, (x, y) = ImageDraw.Draw(picture), map(round, panel.place(voxel))
    left, top = panel.left + _MARKS, panel.top + _MARKS
    right, bottom = panel.left + panel.size[0] - 1 - _MARKS, panel.top + panel.size[1] - 1 - _MARKS
    for low, high in ((left, x - _HOLE), (x + _HOLE, right)):
        if low <= high:
            draw.line([(low, y), (high, y)], CROSSHAIR)
    for low, high in ((top, y - _HOLE), (y + _HOLE, bottom)):
        if low <= high:
            draw.line([(x, low), (x, high)], CROSSHAIR)


def _legend(look: Look, scan: Scan, width: int) -> "Image | None":
    """The heat map's colours with their limits and the masks' colours, as a picture; None where there is neither."""
    from PIL import Image, ImageDraw

    written, entries = font(12), []
    if look.heat_map is not None:
        low, high = look.heat_map.limits
        bar = Image.fromarray(colour_table(look.colour_map)[None, ::-2][:, ::-1]).resize((128, 12))
        entries.append((bar, f"{look.heat_map.name}, {low:.3g} to {high:.3g}"))
    entries += [(Image.new("RGB", (12, 12), scan.colours[name]), name) for name in look.masks]
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
