"""Several slices as one picture: three planes beside each other, two scans, a crosshair, a legend.

A `Composition` also knows which voxel lies under which pixel, so that a click means a place in the patient.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image, ImageDraw

from medctkit.viewers.drawing.rendering import (
    PLANES,
    WHOLE,
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

GAP = 6  # pixels between panels
WIDEST = 2.35  # heights: how wide a row of panels may be; 360 pixels fit JupyterLab on a small screen
LARGE, SINGLE = 1.5, 1.8  # heights: the first of three planes, a single plane
CROSSHAIR = (240, 228, 66)
_HOLE = 9  # pixels: the crosshair leaves its middle free, so that what it points at can be seen
_MARKS = 22  # pixels at the edges that the crosshair leaves to the orientation marks
_GROUND = (50, 50, 50)  # between panels; no slice is there
_LINE = 22  # pixels: a line of the legend


@dataclass(frozen=True)
class Panel:
    """Where a slice lies in the picture."""

    scan: int  # 0, or 1 for the second of two
    plane: str
    left: int  # first column and row of pixels
    top: int
    size: tuple[int, int]  # width and height in pixels
    shape: Voxel  # of the scan, (d, h, w)
    view: tuple[float, float, float, float] = WHOLE  # left, top, right and bottom of what is shown, as shares

    @property
    def axes(self) -> tuple[int, int]:
        """Of (d, h, w) those along the rows' and the columns' numbers."""
        row, column = (axis for axis in range(3) if axis != PLANES[self.plane])
        return row, column

    def voxel(self, x: float, y: float, index: int) -> Voxel:
        """The voxel (d, h, w) under a place of the picture, where the panel shows slice `index`."""
        (row, column), found, (left, top, right, bottom) = self.axes, [index] * 3, self.view
        found[column] = int((left + (x - self.left) / self.size[0] * (right - left)) * self.shape[column])
        found[row] = int((top + (y - self.top) / self.size[1] * (bottom - top)) * self.shape[row])
        if self.plane != "axial":  # head up
            found[row] = self.shape[row] - 1 - found[row]
        return found[0], found[1], found[2]

    def share(self, voxel: Sequence[float]) -> tuple[float, float]:
        """Where in the slice the middle of a voxel (d, h, w) lies: shares of its width and height."""
        row, column = self.axes
        across, down = (voxel[column] + 0.5) / self.shape[column], (voxel[row] + 0.5) / self.shape[row]
        return across, down if self.plane == "axial" else 1 - down

    def place(self, voxel: Sequence[float]) -> tuple[float, float]:
        """Where in the picture the middle of a voxel (d, h, w) lies, pixels; outside of the panel if not shown."""
        (across, down), (left, top, right, bottom) = self.share(voxel), self.view
        across, down = (across - left) / (right - left), (down - top) / (bottom - top)
        return self.left + across * self.size[0], self.top + down * self.size[1]

    def zoomed(self, zoom: float, voxel: Voxel) -> "Panel":
        """The same with so many times fewer of the slice, around a voxel where the slice's edges let it."""
        left, top = (min(max(middle - 0.5 / zoom, 0), 1 - 1 / zoom) for middle in self.share(voxel))
        return replace(self, view=(left, top, left + 1 / zoom, top + 1 / zoom))


class Composition:
    """The slices of one or two scans in one picture.

    Of three planes of a scan the first is large, with the others beside it; of two scans each makes a row, all at the
    same scale. A single plane is large, and two scans lie side by side. A panel in a row has the `height`, in pixels,
    or less where the row would be more than 2.35 times as wide; the first of three is 1.5 times as tall, a single plane
    1.8 times. Above a `zoom` of 1 it shows that many times less, around the `voxels` (d, h, w), one for each scan.

    The slices that were drawn last are kept, one for each panel, so that only what changed is drawn again.
    """

    def __init__(
        self,
        scans: Sequence[Scan],
        planes: Sequence[str] = tuple(PLANES),
        height: int = 360,
        zoom: float = 1.0,
        voxels: Sequence[Voxel] = (),
    ):
        self.scans = tuple(scans)
        self.panels, self.size = _arranged(self.scans, tuple(planes), height)
        if zoom > 1:
            self.panels = tuple(panel.zoomed(zoom, voxels[panel.scan]) for panel in self.panels)
        self._drawn: dict[Panel, tuple[Any, Image.Image]] = {}

    def panel_at(self, x: float, y: float) -> Panel | None:
        """The panel at a place of the picture, pixels from its upper left corner."""
        for panel in self.panels:
            if 0 <= x - panel.left < panel.size[0] and 0 <= y - panel.top < panel.size[1]:
                return panel
        return None

    def shows(self, voxels: Sequence[Voxel]) -> bool:
        """Whether the voxel (d, h, w) of each scan can be seen in all of its panels."""
        return all(self.panel_at(*panel.place(voxels[panel.scan])) == panel for panel in self.panels)

    def picture(self, voxels: Sequence[Voxel], look: Look, crosshair: bool = True) -> Image.Image:
        """The picture (PIL image, RGB) through a voxel (d, h, w) of each scan; masks and map are the first one's."""
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

    def _slice(self, panel: Panel, index: int, look: Look) -> Image.Image:
        scan = self.scans[panel.scan]
        if panel.scan:
            look = Look(look.window)
        if self._drawn.get(panel, (None,))[0] != (index, look):
            picture = draw_slice(scan, panel.plane, index, panel.size, look, panel.view)
            draw_marks(picture, panel.plane, f"{panel.plane} {index}", scan.name)
            self._drawn[panel] = ((index, look), picture)
        return self._drawn[panel][1]


def _arranged(scans: Sequence[Scan], planes: Sequence[str], height: int) -> tuple[tuple[Panel, ...], tuple[int, int]]:
    """Panels, and width and height of them all."""
    rows = [[(i, plane) for plane in planes] for i in range(len(scans))]
    if len(planes) == 1:
        rows = [[(i, planes[0]) for i in range(len(scans))]]
    millimetres = {(i, plane): slice_mm(scans[i].volume, plane) for row in rows for i, plane in row}
    if len(scans) == 1 and len(planes) > 1:
        return _first_large(scans[0], millimetres, height)
    tallest = max(tall for _, tall in millimetres.values())
    widest = max(sum(millimetres[cell][0] for cell in row) for row in rows)
    scale = min(height * (SINGLE if len(planes) == 1 else 1) / tallest, WIDEST * height / widest)  # pixels per mm
    panels, top, right = [], 0, 0
    for row in rows:
        left, below = 0, top
        for i, plane in row:
            size = in_pixels(millimetres[i, plane], scale)
            panels.append(Panel(i, plane, left, top, size, scans[i].volume.shape))
            left, below = left + size[0] + GAP, max(below, top + size[1])
        top, right = below + GAP, max(right, left - GAP)
    return tuple(panels), (right, top - GAP)


def _first_large(
    scan: Scan, millimetres: Mapping[tuple[int, str], tuple[float, float]], height: int
) -> tuple[tuple[Panel, ...], tuple[int, int]]:
    """Panels of one scan, the others of which lie one below the other beside the first."""
    (wide, tall), *others = millimetres.values()
    smaller = min(1.0, tall / sum(down for _, down in others))
    beside = wide + smaller * max(across for across, _ in others)
    scale = min(LARGE * height / tall, WIDEST * height / beside)  # pixels per mm
    smaller = min(scale, (scale * tall - GAP * (len(others) - 1)) / sum(down for _, down in others))
    panels, left, top, right, below = [], 0, 0, 0, 0
    for n, ((i, plane), size_mm) in enumerate(millimetres.items()):
        size = in_pixels(size_mm, smaller if n else scale)
        panels.append(Panel(i, plane, left, top, size, scan.volume.shape))
        right, below = max(right, left + size[0]), max(below, top + size[1])
        left, top = (panels[0].size[0] + GAP, top + size[1] + GAP) if n else (size[0] + GAP, 0)
    return tuple(panels), (right, below)


def _draw_crosshair(picture: Image.Image, panel: Panel, voxel: Voxel) -> None:
    draw, (x, y) = ImageDraw.Draw(picture), map(round, panel.place(voxel))
    if not (0 <= x - panel.left < panel.size[0] and 0 <= y - panel.top < panel.size[1]):
        return  # zoomed past it
    left, top = panel.left + _MARKS, panel.top + _MARKS
    right, bottom = panel.left + panel.size[0] - 1 - _MARKS, panel.top + panel.size[1] - 1 - _MARKS
    for low, high in ((left, x - _HOLE), (x + _HOLE, right)):
        if low <= high:
            draw.line([(low, y), (high, y)], CROSSHAIR)
    for low, high in ((top, y - _HOLE), (y + _HOLE, bottom)):
        if low <= high:
            draw.line([(x, low), (x, high)], CROSSHAIR)


def _legend(look: Look, scan: Scan, width: int) -> Image.Image | None:
    """The heat map's colours with their limits and the masks' colours, as a picture; None where there is neither."""
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
