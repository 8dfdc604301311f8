"""Distances in mm and HU of regions, measured between two voxels of a scan and drawn over its slices."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import ImageDraw
from PIL.Image import Image

from medctkit.viewers.drawing.composition import Panel
from medctkit.viewers.drawing.rendering import PLANES, Scan, Voxel, font

TOOLS = ("crosshair", "distance", "region")
_COLOUR = (86, 222, 120)


@dataclass(frozen=True)
class Ruler:
    """Measures between two voxels (d, h, w): a straight line in space, or the ellipse in their rectangle."""

    tool: str  # "distance" or "region"
    start: Voxel
    end: Voxel  # the ellipse lies in its slice
    plane: str  # of the ellipse

    def distance(self, scan: Scan) -> float:
        """From middle to middle, mm; right to a voxel."""
        return float(np.linalg.norm(scan.point_of(self.end) - scan.point_of(self.start)))

    def inside(self, scan: Scan) -> np.ndarray:
        """HU of the voxels whose middles lie in the ellipse, (n,); at least one."""
        axis = PLANES[self.plane]
        hu = np.moveaxis(scan.volume.hu, axis, 0)[self.end[axis]]
        start, end = (np.delete(voxel, axis) for voxel in (self.start, self.end))
        middle, half = ((start + end) / 2)[:, None, None], ((abs(end - start) + 1) / 2)[:, None, None]
        return hu[(((np.indices(hu.shape) - middle) / half) ** 2).sum(0) <= 1]

    def described(self, scan: Scan) -> str:
        """The distance; or size, mean and standard deviation of the region, in words."""
        if self.tool == "distance":
            return f"distance {self.distance(scan):.1f} mm"
        steps = [step for axis, step in enumerate(scan.volume.spacing) if axis != PLANES[self.plane]]
        hu = self.inside(scan).astype(float)
        return (
            f"region {hu.size * np.prod(steps):,.0f} mm², {hu.size:,} voxels: mean {hu.mean():.0f} HU, "
            f"deviation {hu.std():.0f} HU, {hu.min():.0f} to {hu.max():.0f} HU"
        )

    def draw(self, picture: Image, panels: Sequence[Panel], scan: Scan) -> None:
        """Draw it over a picture: a line in all panels of the first scan, an ellipse in its plane's."""
        for panel in panels:
            if panel.scan or (self.tool == "region" and panel.plane != self.plane):
                continue
            at = (panel.left, panel.top, panel.left + panel.size[0], panel.top + panel.size[1])
            tile = picture.crop(at)  # what is zoomed past ends at the panel's edge
            draw = ImageDraw.Draw(tile)
            if self.tool == "distance":
                (x, y), (u, v) = (self._in(panel, end) for end in (self.start, self.end))
                draw.line([(x, y), (u, v)], _COLOUR, 2)
                for a, b in ((x, y), (u, v)):
                    draw.ellipse([a - 3, b - 3, a + 3, b + 3], outline=_COLOUR)
                said = (u + 8, v + 4), f"{self.distance(scan):.1f} mm"
            else:
                low, high = np.minimum(self.start, self.end) - 0.5, np.maximum(self.start, self.end) + 0.5
                (x, y), (u, v) = (self._in(panel, end.tolist()) for end in (low, high))
                draw.ellipse([min(x, u), min(y, v), max(x, u), max(y, v)], outline=_COLOUR, width=2)
                said = (max(x, u) + 4, min(y, v)), f"{self.inside(scan).mean():.0f} HU"
            draw.text(said[0], said[1], _COLOUR, font(13), stroke_width=2, stroke_fill=(0, 0, 0))
            picture.paste(tile, at[:2])

    @staticmethod
    def _in(panel: Panel, voxel: Sequence[float]) -> tuple[float, float]:
        x, y = panel.place(voxel)
        return x - panel.left, y - panel.top
