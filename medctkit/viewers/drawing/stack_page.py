"""A stack of slices as one HTML file that needs neither a kernel nor a network: to hand out, to mail, to hang in.

Slider, mouse wheel and keys choose the slice; masks and a heat map are layers with an opacity of their own. The text
under the picture and the picture's alternative text say which slice it is, where it lies and what is marked in it.
Nothing of the scan's header goes into the page.
"""

import base64
import hashlib
import html
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from medctkit.common.atomic import replacing
from medctkit.viewers.drawing.rendering import (
    MARKS,
    PLANES,
    Look,
    Scan,
    checked_plane,
    colour_table,
    draw_slice,
    heat_share,
    mask_colours,
    pixel_size,
    slice_of,
    window_of,
)

QUALITY = 50  # of WebP: 240 slices in two windows take 5 MB where the CT is noisy, 3 MB where it is not
_MAP_POINTS = 48  # a side of a heat map
_ALONG = {"axial": 2, "coronal": 1, "sagittal": 0}  # patient axis (RAS) that a plane moves along


def write_stack_page(
    path: str | os.PathLike,
    scan: Scan,
    plane: str = "axial",
    windows: Mapping[str, tuple[float, float]] | None = None,
    look: Look | None = None,
    title: str = "CT",
    height: int = 448,
) -> Path:
    """Write a stack as a self-contained HTML page; written whole or not at all.

    Args:
        path: the file.
        scan: what to show.
        plane: "axial", "coronal" or "sagittal".
        windows: named (centre, width) in HU to choose from; the lung window if not given.
        look: its masks and heat map become layers; its window is not used.
        title: heading of the page.
        height: of the picture, pixels, or its width where it is wider.

    Raises:
        ValueError: unknown plane, a window that is none.
    """
    path, look = Path(path), Look() if look is None else look
    windows = {name: window_of(pair) for name, pair in (windows or {"lung": "lung"}).items()}
    volume, axis = scan.volume, PLANES[checked_plane(plane)]
    tall, wide = (
        n * step for n, step in zip(slice_of(volume.hu, plane, 0).shape, pixel_size(volume, plane), strict=True)
    )
    scale = height / max(tall, wide)
    size = max(1, round(scale * wide)), max(1, round(scale * tall))
    numbers = range(volume.shape[axis])
    layers = []
    if look.heat_map is not None:
        low, high = look.heat_map.limits
        layers.append({
            "name": "heat map", "opacity": look.heat_opacity,
            "slices": [_heat(look, scan, plane, i) for i in numbers],
            "legend": f'<i class="bar"></i> {html.escape(look.heat_map.name)}, {low:.3g} to {high:.3g}',
        })  # fmt: skip
    colours = mask_colours([*scan.masks])
    if look.masks:
        swatches = (f'<i class="m{i}"></i> {html.escape(name)}' for i, name in enumerate(look.masks))
        layers.append({
            "name": "masks", "opacity": look.opacity,
            "slices": [_tint(look, scan, plane, i) for i in numbers], "legend": " &ensp; ".join(swatches),
        })  # fmt: skip
    style = STYLE + f".stack {{ width: {size[0]}px; aspect-ratio: {size[0]} / {size[1]}; }}\n"
    style += "".join(f".m{i} {{ background: rgb{colours[name]}; }}\n" for i, name in enumerate(look.masks))
    stops = ", ".join(f"rgb({r} {g} {b})" for r, g, b in colour_table(look.colour_map)[::51])
    style += f".legend .bar {{ width: 6em; background: linear-gradient(to right, {stops}); }}\n"
    data = {
        "windows": [
            [_image(draw_slice(scan, plane, i, size, Look(pair)).convert("L"), quality=QUALITY) for i in numbers]
            for pair in windows.values()
        ],
        "names": [f"{name} window, centre {c:g} HU, width {w:g} HU" for name, (c, w) in windows.items()],
        "texts": [_text(scan, plane, i, look.masks) for i in numbers],
        "layers": [layer["slices"] for layer in layers],
    }
    page = _page(title, plane, list(windows), layers, data, style, len(numbers) // 2)
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _page(title, plane, windows, layers, data, style, first) -> str:
    def digest(text: str) -> str:
        return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    policy = f"default-src 'none'; img-src data:; style-src '{digest(style)}'; script-src '{digest(SCRIPT)}'"
    heading, last = html.escape(f"{title}, {plane}"), len(data["texts"]) - 1
    marks = "".join(
        f'<b class="{side}" aria-hidden="true">{letter}</b>'
        for side, letter in zip(("left", "right", "top", "bottom"), MARKS[plane], strict=True)
    )
    shown = "".join('<img class="layer" alt="" hidden>' for _ in layers)
    choices = "".join(
        f'<label><input type="radio" name="window" value="{i}"{" checked" * (i == 0)}> {html.escape(name)}</label>'
        for i, name in enumerate(windows)
    )
    sliders = "".join(
        f'<label>{layer["name"]}: opacity <input type="range" class="opacity" min="0" max="1" step="0.05" '
        f'value="{layer["opacity"]}"></label><p class="legend">{layer["legend"]}</p>'
        for layer in layers
    )
    alt = html.escape(f"{data['texts'][first]}; {data['names'][0]}")
    packed = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # no name may end the script
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width"><title>{heading}</title><style>{style}</style></head><body>
<h1>{heading}</h1>
<div class="stack" id="stack"><img id="slice" alt="{alt}" src="{data["windows"][0][first]}">{shown}{marks}</div>
<p id="text" aria-live="polite">{html.escape(data["texts"][first])}</p>
<label>{plane} slice <input type="range" id="index" min="0" max="{last}" value="{first}" autofocus></label>
<fieldset><legend>window</legend>{choices}</fieldset>
{sliders}
<p class="help">Slices: the slider, the mouse wheel over the picture, arrow keys, page up and page down. R right,
L left, A front, P back, S head, I feet of the patient; positions are patient coordinates in mm.</p>
<noscript><p>Without JavaScript only the middle slice is shown.</p></noscript>
<script type="application/json" id="data">{packed}</script><script>{SCRIPT}</script></body></html>
"""


def _image(picture, **how) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "webp", **how)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _tint(look: Look, scan: Scan, plane: str, index: int) -> str | None:
    """The masks of a slice, one pixel for each voxel, transparent elsewhere; None where there are none."""
    from PIL import Image

    colours, tint = mask_colours([*scan.masks]), None
    for name in look.masks:
        filled = slice_of(scan.masks[name], plane, index)
        tint = np.zeros((*filled.shape, 4), np.uint8) if tint is None else tint
        tint[filled] = (*colours[name], 255)
    return _image(Image.fromarray(tint), lossless=True) if tint.any() else None


def _heat(look: Look, scan: Scan, plane: str, index: int) -> str:
    """The heat map of a slice on its coarse grid, the more transparent the lower its value."""
    from PIL import Image

    levels = np.rint(255 * heat_share(look.heat_map, scan.volume, plane, index, _MAP_POINTS)).astype(np.uint8)
    picture = Image.fromarray(np.dstack([colour_table(look.colour_map)[levels], levels]))
    return _image(picture, quality=QUALITY, alpha_quality=80)


def _text(scan: Scan, plane: str, index: int, masks: tuple[str, ...]) -> str:
    """What is said of a slice: its number, where its middle lies, what is marked in it."""
    voxel = (np.array(scan.volume.shape) - 1) / 2
    voxel[PLANES[plane]] = index
    axis = _ALONG[plane]
    place = round(float(scan.point_of(voxel)[axis]))
    last = scan.volume.shape[PLANES[plane]] - 1
    marked = [name for name in masks if slice_of(scan.masks[name], plane, index).any()]
    said = f"{plane} slice {index} of 0 to {last}, {('RAS', 'LPI')[place < 0][axis]} {abs(place)} mm"
    return f"{said}; marked: {', '.join(marked)}" if marked else said


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 1rem auto; padding: 0 1rem; max-width: 60rem; color: #222; }
h1 { font-size: 1.3rem; } label { display: block; margin: .4rem 0; }
fieldset { border: 1px solid #ccc; width: fit-content; } fieldset label { display: inline; margin: 0 1rem 0 0; }
.stack { position: relative; max-width: 100%; background: #000; }
.stack img { position: absolute; inset: 0; width: 100%; height: 100%; }
.stack b { position: absolute; color: #96c8ff; text-shadow: 0 0 3px #000, 0 0 3px #000; }
.left { left: 6px; top: 50%; transform: translateY(-50%); }
.right { right: 6px; top: 50%; transform: translateY(-50%); }
.top { top: 2px; left: 50%; transform: translateX(-50%); }
.bottom { bottom: 2px; left: 50%; transform: translateX(-50%); }
.legend { margin: .2rem 0; } .legend i { display: inline-block; width: 1em; height: 1em; vertical-align: -.1em; }
#index { width: min(30rem, 70%); vertical-align: middle; } .help { color: #555; font-size: .85rem; }
input:focus-visible { outline: 3px solid #0072b2; outline-offset: 2px; }
"""

SCRIPT = """
const data = JSON.parse(document.getElementById("data").textContent);
const index = document.getElementById("index"), slice = document.getElementById("slice");
const layers = [...document.querySelectorAll(".layer")], opacities = [...document.querySelectorAll(".opacity")];
function show() {
  const i = Number(index.value), window_ = Number(document.querySelector("[name=window]:checked").value);
  slice.src = data.windows[window_][i];
  slice.alt = data.texts[i] + "; " + data.names[window_];
  document.getElementById("text").textContent = data.texts[i];
  index.setAttribute("aria-valuetext", data.texts[i]);
  layers.forEach((layer, n) => {
    const picture = data.layers[n][i];
    layer.hidden = !picture;
    if (picture) layer.src = picture;
    layer.style.opacity = opacities[n].value;
  });
}
function step(by) { index.value = Number(index.value) + by; show(); }
document.getElementById("stack").addEventListener("wheel", event => {
  event.preventDefault();
  step(event.deltaY < 0 ? 1 : -1);
}, { passive: false });
const keys = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1, PageUp: 10, PageDown: -10 };
document.addEventListener("keydown", event => {
  if (event.target.tagName === "INPUT" || !(event.key in keys)) return;
  event.preventDefault();
  step(keys[event.key]);
});
document.addEventListener("input", show);
show();
"""
