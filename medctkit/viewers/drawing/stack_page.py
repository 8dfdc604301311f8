"""A stack of slices as one HTML file that needs neither a kernel nor a network: to hand out, to mail, to hang in.

Slider, mouse wheel and keys choose the slice; masks and a heat map are layers with an opacity of their own. The text
under the picture and the picture's alternative text say which slice it is, where it lies and what is marked in it. A
second scan lies beside the first, at the same scale, and shows the same place, or nothing where it does not reach it.
Nothing of the scan's header goes into the page.
"""

import base64
import hashlib
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medctkit.common.atomic import write_text
from medctkit.common.templates import filled
from medctkit.scans.heat_map import HeatMap
from medctkit.viewers.drawing.linked_scans import NOT_REACHED, LinkedScans
from medctkit.viewers.drawing.rendering import (
    MARKS,
    PLANES,
    Look,
    Scan,
    colour_table,
    draw_slice,
    heat_share,
    in_pixels,
    place_of,
    slice_mm,
    slice_of,
)

QUALITY = 50  # of WebP: 240 slices in two windows take 5 MB where the CT is noisy, 3 MB where it is not
_MAP_POINTS = 48  # a side of a heat map
_HEIGHT = 448  # of the picture, pixels, or its width where it is wider


def write_stack_page(
    path: str | os.PathLike,
    linked: LinkedScans,
    plane: str,
    windows: Mapping[str, tuple[float, float]],
    look: Look,
    title: str,
) -> Path:
    """Write the stacks of `linked` scans in a `plane` to `path`, a self-contained HTML page, whole or not at all.

    There are `windows` in HU to choose from; the masks and the heat map of `look` become layers of the first, its
    window is not used; `title` is the heading.

    Raises:
        ValueError: unknown plane.
    """
    path, scan = Path(path).expanduser(), linked.scans[0]
    slice_of(scan.volume.hu, plane, 0)  # refuses an unknown plane
    scale = _HEIGHT / max(slice_mm(scan.volume, plane))
    sizes = [in_pixels(slice_mm(each.volume, plane), scale) for each in linked.scans]
    axis, numbers = PLANES[plane], range(scan.volume.shape[PLANES[plane]])
    layers: list[dict[str, Any]] = []
    if look.heat_map is not None:
        low, high = look.heat_map.limits
        layers.append({
            "name": "heat map", "opacity": look.heat_opacity,
            "slices": [_heat(look, look.heat_map, scan, plane, i) for i in numbers],
            "legend": [("bar", f"{look.heat_map.name}, {low:.3g} to {high:.3g}")],
        })  # fmt: skip
    if look.masks:
        layers.append({
            "name": "masks", "opacity": look.opacity, "slices": [_tint(look, scan, plane, i) for i in numbers],
            "legend": [(f"m{i}", name) for i, name in enumerate(look.masks)],
        })  # fmt: skip
    stops = [f"rgb({r} {g} {b})" for r, g, b in colour_table(look.colour_map)[::51]]
    masked = [f"rgb{scan.colours[name]}" for name in look.masks]
    style = filled("stack.css", sizes=sizes, stops=stops, colours=masked)
    script = filled("stack.js")
    texts = [[_text(scan, plane, i, look.masks) for i in numbers]]
    there: list[int | None] = []  # for each slice of the first that of the second
    if len(linked.scans) > 1:
        middle, (first, other) = [n // 2 for n in scan.volume.shape], linked.scans
        voxels = [linked.in_second((*middle[:axis], i, *middle[axis + 1 :])) for i in numbers]  # type: ignore[arg-type]
        there = [voxel and voxel[axis] for voxel in voxels]
        beside = [NOT_REACHED if i is None else _text(other, plane, i, ()) for i in there]
        texts = [[f"{one.name}: {said}" for said in of] for one, of in ((first, texts[0]), (other, beside))]
    data = {
        "scans": [_grey(each, plane, size, windows) for each, size in zip(linked.scans, sizes, strict=True)],
        "there": there,
        "names": [f"{name} window, centre {c:g} HU, width {w:g} HU" for name, (c, w) in windows.items()],
        "texts": texts,
        "layers": [layer["slices"] for layer in layers],
    }
    page = filled(
        "stack.html", title=title, plane=plane, windows=list(windows), layers=layers, data=data,
        first=len(numbers) // 2, how=linked.how if there else "",
        marks=list(zip(("left", "right", "top", "bottom"), MARKS[plane], strict=True)),
        style=style, style_digest=_digest(style), script=script, script_digest=_digest(script),
    )  # fmt: skip
    write_text(path, page)
    return path


def _digest(text: str) -> str:
    """The hash by which the page's policy knows its own style and script, and refuses any other."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _image(picture: Image.Image, **how: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "webp", **how)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _grey(scan: Scan, plane: str, size: tuple[int, int], windows: Mapping[str, tuple[float, float]]) -> list[list[str]]:
    """A scan's slices in each window."""
    numbers = range(scan.volume.shape[PLANES[plane]])
    return [
        [_image(draw_slice(scan, plane, i, size, Look(pair)).convert("L"), quality=QUALITY) for i in numbers]
        for pair in windows.values()
    ]


def _tint(look: Look, scan: Scan, plane: str, index: int) -> str | None:
    """The masks of a slice, one pixel for each voxel, transparent elsewhere; None where there are none."""
    tint = np.zeros((*slice_of(scan.volume.hu, plane, index).shape, 4), np.uint8)
    for name in look.masks:
        tint[slice_of(scan.masks[name], plane, index)] = (*scan.colours[name], 255)
    return _image(Image.fromarray(tint), lossless=True) if tint.any() else None


def _heat(look: Look, heat_map: HeatMap, scan: Scan, plane: str, index: int) -> str:
    """The heat map of a slice on its coarse grid, the more transparent the lower its value."""
    levels = np.rint(255 * heat_share(heat_map, scan.volume, plane, index, _MAP_POINTS)).astype(np.uint8)
    picture = Image.fromarray(np.dstack([colour_table(look.colour_map)[levels], levels]))
    return _image(picture, quality=QUALITY, alpha_quality=80)


def _text(scan: Scan, plane: str, index: int, masks: tuple[str, ...]) -> str:
    """What is said of a slice: its number, where its middle lies, what is marked in it."""
    axis, middle = PLANES[plane], (np.array(scan.volume.shape) - 1) / 2
    middle[axis] = index
    place = place_of(scan.point_of(middle)).split(", ")[2 - axis]  # a plane moves along one patient axis
    marked = [name for name in masks if slice_of(scan.masks[name], plane, index).any()]
    said = f"{plane} slice {index} of 0 to {scan.volume.shape[axis] - 1}, {place}"
    return f"{said}; marked: {', '.join(marked)}" if marked else said
