"""From a CT to pictures: windows, slices in radiological orientation, masks and heat maps over them.

Plain functions from a volume to a picture, without a widget. Slices are shown as radiologists hang them: axial from
below, so that the patient's right is on the left of the picture; coronal from the front; sagittal with the front on
the left.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from medctkit.findings import WINDOW
from medctkit.scans.geometry import CANONICAL, straight_affine, turned_axes
from medctkit.scans.heat_map import HeatMap
from medctkit.scans.volumes import CTVolume

if TYPE_CHECKING:
    from medctkit.phantom.study import PhantomStudy

Voxel = tuple[int, int, int]  # (d, h, w)
Window = str | tuple[float, float]  # a preset, or centre and width in HU
# centre and width, HU
WINDOWS: dict[str, tuple[float, float]] = {"lung": (-600, 1500), "mediastinum": (40, 400), "bone": (400, 1800)}
PLANES = {"axial": 0, "coronal": 1, "sagittal": 2}
MARKS = {"axial": ("R", "L", "A", "P"), "coronal": ("R", "L", "S", "I"), "sagittal": ("A", "P", "S", "I")}
COLOUR_MAPS = ("inferno", "viridis", "cividis")
# Okabe and Ito's colours, told apart by colour-blind people and from grey; yellow is the crosshair's
MASK_COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (213, 94, 0), (204, 121, 167), (0, 114, 178))
SLABS = ("one slice", "maximum", "minimum", "mean")  # of HU, over the thickness of a slab
WHOLE = (0.0, 0.0, 1.0, 1.0)  # of a slice: left, top, right and bottom of what is shown of it, as shares
_MAP_POINTS = 96  # a side: a heat map is coarse, and asked for at no more points than this
_CROP, _DEEP = 120.0, 10.0  # mm of a gallery: a crop's side, at least; a finding as deep has the arrow's tip in it
_EDGE_POINTS = 256  # where its cells are shown with their edges


def window(hu: ArrayLike, centre: float, width: float) -> np.ndarray:
    """Grey values in [0, 1] of Hounsfield units seen through a window.

    Raises:
        ValueError: a width that is not above 0.
    """
    if not width > 0:
        raise ValueError(f"window width must be above 0 HU, got {width}")
    return np.clip((np.asarray(hu, dtype=np.float32) - centre) / width + 0.5, 0.0, 1.0)


def window_of(name_or_pair: Window) -> tuple[float, float]:
    """Centre and width in HU of a preset ("lung", "mediastinum", "bone") or of a (centre, width) pair."""
    if isinstance(name_or_pair, str):
        if name_or_pair not in WINDOWS:
            raise ValueError(f"unknown window {name_or_pair!r}; choose one of {', '.join(WINDOWS)} or (centre, width)")
        return WINDOWS[name_or_pair]
    pair = tuple(map(float, name_or_pair))
    if len(pair) != 2 or not np.isfinite(pair).all() or pair[1] <= 0:
        raise ValueError(f"window {pair}: expected a preset, or a finite centre and a width above 0, both in HU")
    return pair[0], pair[1]


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
    cut = array[(slice(None),) * axis + (index,)]
    return cut if plane == "axial" else cut[::-1]  # head up


def slab_of(volume: CTVolume, plane: str, index: int, how: str, thickness: float) -> np.ndarray:
    """Maximum, minimum or mean HU (rows, columns) through a slab of so many mm around a slice; or the slice itself."""
    if how not in SLABS:
        raise ValueError(f"unknown slab {how!r}; choose one of {', '.join(SLABS)}")
    cut = slice_of(volume.hu, plane, index)
    half = int(thickness / volume.spacing[PLANES[plane]] / 2)
    if how == SLABS[0] or not half:
        return cut
    block = np.moveaxis(volume.hu, PLANES[plane], 0)[max(0, index - half) : index + half + 1]
    flat = block.mean(0, dtype=np.float32) if how == "mean" else getattr(block, how[:3])(0)
    return flat if plane == "axial" else flat[::-1]


def slice_mm(volume: CTVolume, plane: str) -> tuple[float, float]:
    """Width and height of a slice, mm."""
    extent = [n * step for n, step in zip(volume.shape, volume.spacing, strict=True)]
    tall, wide = (mm for axis, mm in enumerate(extent) if axis != PLANES[plane])
    return wide, tall


def in_pixels(millimetres: Sequence[float], scale: float) -> tuple[int, int]:
    """Width and height in pixels of a slice of so many mm, at `scale` pixels per mm."""
    wide, tall = (max(1, round(scale * mm)) for mm in millimetres)
    return wide, tall


@dataclass(frozen=True, eq=False)
class Scan:
    """A volume and its masks, turned to SPL: ready to be drawn. Made with `Scan.of`."""

    volume: CTVolume
    masks: Mapping[str, np.ndarray] = field(default_factory=dict)  # bool, (d, h, w)
    name: str = ""  # what it is called where two scans are shown
    placed: bool = True  # the affine says where the patient lay; not only what spacing and orientation give

    @classmethod
    def of(cls, volume: CTVolume, masks: Mapping[str, np.ndarray] | None = None, name: str = "") -> "Scan":
        """A scan of a volume in any orientation, with masks that are filled where they aren't 0.

        Raises:
            TypeError: not a CTVolume.
            ValueError: a mask of another shape.
        """
        if not isinstance(volume, CTVolume):
            raise TypeError(f"expected a CTVolume, as read_volume(path) gives it, got {type(volume).__name__}")
        hung, (order, flipped) = {}, turned_axes(volume.orientation)
        for title, mask in (masks or {}).items():
            if np.shape(mask) != volume.shape:
                raise ValueError(f"mask {title!r} has shape {np.shape(mask)}, the volume {volume.shape}: unequal")
            hung[title] = np.flip(np.asarray(mask).astype(bool, copy=False).transpose(order), flipped)
        placed = not np.allclose(volume.affine, straight_affine(volume.spacing, volume.orientation))
        return cls(volume.reoriented(), hung, name, placed)

    def point_of(self, voxel: ArrayLike) -> np.ndarray:
        """Patient coordinates (RAS, mm) of a voxel's middle."""
        return self.volume.affine[:3, :3] @ np.asarray(voxel) + self.volume.affine[:3, 3]

    def voxel_of(self, point: ArrayLike) -> np.ndarray:
        """Where a point (RAS, mm) lies, as an index (d, h, w) with fractions; may be outside."""
        return np.linalg.solve(self.volume.affine[:3, :3], np.asarray(point, float) - self.volume.affine[:3, 3])

    def nearest(self, voxel: ArrayLike) -> Voxel:
        """The voxel of the scan that is nearest to an index with fractions."""
        d, h, w = np.clip(np.rint(voxel), 0, np.array(self.volume.shape) - 1).astype(int).tolist()
        return d, h, w

    def described(self, voxel: Sequence[int]) -> str:
        """Where a voxel (d, h, w) lies in the patient, and its value: "R 12 mm, P 30 mm, S 41 mm · -842 HU"."""
        return f"{place_of(self.point_of(voxel))} · {self.volume.hu[tuple(voxel)]:.0f} HU"

    @property
    def colours(self) -> dict[str, tuple[int, int, int]]:
        """A colour for each mask; after six they come again."""
        return dict(zip(self.masks, itertools.cycle(MASK_COLOURS)))  # noqa: B905

    @property
    def middle(self) -> np.ndarray:
        """The middle of the scanned box, patient coordinates in mm."""
        return self.point_of((np.array(self.volume.shape) - 1) / 2)


def place_of(point: ArrayLike) -> str:
    """Patient coordinates (3,) in words: how far to which side of the scan's origin, "R 12 mm, P 30 mm, S 41 mm"."""
    rounded = (round(x) for x in np.asarray(point, float).tolist())
    return ", ".join(f"{side[x < 0]} {abs(x)} mm" for side, x in zip(("RL", "AP", "SI"), rounded, strict=True))


@lru_cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font of all marks and legends."""
    return ImageFont.load_default(size=size)


@lru_cache
def colour_table(name: str) -> np.ndarray:
    """The colours (256, 3) of a colour map out of `COLOUR_MAPS`, from its low to its high end."""
    if name not in COLOUR_MAPS:
        raise ValueError(f"unknown colour map {name!r}; choose one of {', '.join(COLOUR_MAPS)}")
    return colormaps[name](np.arange(256), bytes=True)[:, :3]


@dataclass(frozen=True)
class Look:
    """How slices are drawn."""

    window: tuple[float, float] = WINDOWS["lung"]  # centre and width, HU
    masks: tuple[str, ...] = ()  # names of those that are shown
    opacity: float = 0.35  # of the masks' tint, 0 to 1; their outlines are always drawn
    heat_map: HeatMap | None = None
    heat_opacity: float = 0.6  # where the map is highest, 0 to 1
    colour_map: str = COLOUR_MAPS[0]
    slab: str = SLABS[0]  # masks and heat map stay those of the slice in its middle
    thickness: float = 10.0  # of the slab, mm


def draw_slice(
    scan: Scan,
    plane: str,
    index: int,
    size: tuple[int, int],
    look: Look,
    view: tuple[float, float, float, float] = WHOLE,
) -> Image.Image:
    """A slice of a `scan`, the `index` along the `plane`'s axis, as a picture (PIL image, RGB), without text.

    A heat map covers the more the higher its value is: where it is lowest the CT is as it was. Masks lie over it; the
    `look` says which. The `size` is width and height, pixels; `view` has left, top, right and bottom of what is shown,
    as shares.
    """

    def sized(array: np.ndarray, smooth: bool = True) -> Any:
        (tall, wide), (left, top, right, bottom) = array.shape, view
        how = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
        return Image.fromarray(array).resize(size, how, (left * wide, top * tall, right * wide, bottom * tall))

    hu = slab_of(scan.volume, plane, index, look.slab, look.thickness)
    picture = sized(np.rint(255 * window(hu, *look.window)).astype(np.uint8)).convert("RGB")
    if (heat_map := look.heat_map) is not None:
        share = sized(heat_share(heat_map, scan.volume, plane, index), heat_map.smooth)
        levels = np.rint(255 * np.asarray(share)).astype(np.uint8)
        cover = Image.fromarray(np.rint(look.heat_opacity * levels).astype(np.uint8))
        picture.paste(Image.fromarray(colour_table(look.colour_map)[levels]), (0, 0), cover)
    for name in look.masks:
        inside = np.asarray(sized(slice_of(scan.masks[name], plane, index).astype(np.uint8), smooth=False)) > 0
        around = np.pad(inside, 1)  # a mask that leaves the picture is outlined there too
        edge = inside & ~(around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:])
        strength = (255 * look.opacity * inside).astype(np.uint8)
        strength[edge] = 255
        picture.paste(scan.colours[name], (0, 0, *size), Image.fromarray(strength))
    return picture


def heat_share(heat_map: HeatMap, volume: CTVolume, plane: str, index: int, most: int | None = None) -> np.ndarray:
    """A heat map on a grid of at most `most` points a side of a slice: (rows, columns) float32.

    0 for its lowest value, 1 for its highest; 0 too where the map says nothing, or is the same everywhere.
    """
    low, high = heat_map.limits
    most = most or (_MAP_POINTS if heat_map.smooth else _EDGE_POINTS)
    coarse = [np.linspace(-0.5, n - 0.5, 2 * min(n, most) + 1)[1::2] for n in volume.shape]  # middles of equal parts
    coarse[PLANES[plane]] = np.array([index])
    voxels = np.stack(np.meshgrid(*coarse, indexing="ij"), axis=-1)
    found = heat_map.at(voxels @ volume.affine[:3, :3].T + volume.affine[:3, 3])
    share = (found - low) / (high - low) if high > low else np.zeros_like(found)
    share = np.nan_to_num(share).clip(0, 1).astype(np.float32).squeeze(PLANES[plane])
    return share if plane == "axial" else share[::-1]


def draw_marks(picture: Image.Image, plane: str, title: str = "", name: str = "") -> None:
    """Write the sides of the patient at the edges of a slice, and what it is in its corners."""
    draw, (wide, tall) = ImageDraw.Draw(picture), picture.size
    left, right, top, bottom = MARKS[plane]
    for text, at, anchor in (
        (left, (6, tall / 2), "lm"), (right, (wide - 6, tall / 2), "rm"),
        (top, (wide / 2, 20 if title and wide < 200 else 4), "mt"), (bottom, (wide / 2, tall - 4), "mb"),
    ):  # fmt: skip
        draw.text(at, text, (150, 200, 255), font(15), anchor, stroke_width=2, stroke_fill=(0, 0, 0))
    for text, at, anchor in ((title, (6, 5), "lt"), (name, (6, tall - 5), "lb")):
        draw.text(at, text, (255, 255, 255), font(12), anchor, stroke_width=2, stroke_fill=(0, 0, 0))


def render(
    volume: CTVolume,
    plane: str,
    index: int,
    window: Window = "lung",
    masks: Mapping[str, np.ndarray] | None = None,
    opacity: float = 0.35,
    height: int = 480,
    *,
    heat_map: HeatMap | None = None,
) -> Image.Image:
    """A slice as a picture (PIL image, RGB), with orientation marks and the right aspect ratio.

    Args:
        volume: in SPL orientation.
        plane: "axial", "coronal" or "sagittal".
        index: slice along the plane's axis.
        window: preset name or (centre, width) in HU.
        masks: named boolean arrays (d, h, w), each tinted and outlined in a colour of its own.
        opacity: of the tint, 0 to 1.
        height: of the picture, pixels; less where the slice is more than twice as wide as it is tall.
        heat_map: laid over the slice.

    Raises:
        ValueError: a volume in another orientation (its marks would be wrong), unknown plane or window, a mask of
            another shape.
        IndexError: no such slice.
    """
    if volume.orientation != CANONICAL:
        raise ValueError(f"volume in orientation {volume.orientation}, expected SPL: pass volume.reoriented()")
    scan, look = Scan.of(volume, masks), Look(window_of(window), tuple(masks or ()), opacity, heat_map)
    slice_of(volume.hu, plane, index)  # refuses what is not there
    wide, tall = slice_mm(volume, plane)
    scale = min(height / tall, 2 * height / wide)  # pixels per mm; a thin slab must not fill metres
    picture = draw_slice(scan, plane, index, in_pixels((wide, tall), scale), look)
    draw_marks(picture, plane)
    return picture


def largest_slice(mask: np.ndarray) -> int:
    """Index of the axial slice with most of a mask (d, h, w)."""
    return int(np.asarray(mask).sum(axis=(1, 2)).argmax())


def finding_gallery(studies: Sequence["PhantomStudy"], columns: int = 6) -> Figure:
    """Each study's first finding: a crop where its mask is largest, in the window that shows it, and an arrow at it.

    Raises:
        ValueError: no studies, or one without a finding.
    """
    import matplotlib.pyplot as plt

    if not studies or not all(study.masks for study in studies):
        raise ValueError("a gallery shows studies with findings: give at least one, and leave out those without")
    rows = -(-len(studies) // columns)
    size = (2.5 * columns, 2.75 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, facecolor="black", squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    arrow = {"arrowstyle": "-|>", "color": np.array(MASK_COLOURS[0]) / 255, "lw": 2, "mutation_scale": 14}
    for ax, study in zip(axes.flat, studies, strict=False):
        name, mask = next(iter(study.masks.items()))
        scan = Scan.of(study.volume, {name: mask})
        index = largest_slice(scan.masks[name])
        (left, top, side), tip, tail = _pointed_at(scan.masks[name][index], scan.volume.spacing[1:])
        wide, tall = slice_mm(scan.volume, "axial")
        picture = render(scan.volume, "axial", index, WINDOW.get(name, "lung"), height=1000)
        ax.imshow(picture, extent=(0, wide, tall, 0), interpolation="antialiased")
        ax.set(xlim=(left, left + side), ylim=(top + side, top))
        ax.annotate("", tip, tail, arrowprops=arrow)
        ax.set_title(name, color="white", fontsize=9)
    figure.tight_layout(pad=0.4)
    return figure


def _pointed_at(
    mask: np.ndarray, spacing: Sequence[float]
) -> tuple[tuple[float, float, float], np.ndarray, np.ndarray]:
    """A square (left, top, side) around the largest piece of a mask (h, w); tip and tail (x, y) of an arrow; in mm."""
    pieces, _ = ndimage.label(mask)
    piece = pieces == np.bincount(pieces[pieces > 0]).argmax()
    scale, whole = np.array(spacing), np.array(mask.shape) * spacing
    first, last = np.argwhere(piece).min(0) * scale, (np.argwhere(piece).max(0) + 1) * scale
    side = min(max(_CROP, 1.5 * (last - first).max()), whole.max())
    corner = np.clip((first + last - side) / 2, 0, np.maximum(whole - side, 0))

    depth, edge = ndimage.distance_transform_edt(np.pad(piece, 1), scale, return_indices=True)
    at = np.unravel_index(depth.argmax(), depth.shape)
    deepest, way = (np.array(at) - 0.5) * scale, (edge[:, *at] - at) * scale / depth[at]
    if not ((corner < deepest + side / 3 * way) & (deepest + side / 3 * way < corner + side)).all():
        way = -way  # from the other side, where there is room
    tip = deepest + (0 if depth[at] > _DEEP else depth[at]) * way
    return (corner[1], corner[0], side), tip[::-1], (tip + side / 4 * way)[::-1]
