"""Draws CT-CLIP with its LoRA: `python -m tools.architecture notebooks/images`.

One picture, and one for each notebook that is about a part of it, which says "you are here". Sizes and counts come from
the full-size model itself, built without its weights.
"""

from functools import cache
from html import escape
from pathlib import Path
from typing import Annotated

import torch
import typer

import medctkit
from medctkit import lora
from medctkit.common.atomic import write_text

GREY, BLUE, GREEN, ORANGE, INK = "#eceff1", "#d6e6f2", "#d9ecdf", "#d55e00", "#263238"
HERE = {"03": ("cosine",), "05": ("scan", "patches", "spatial", "temporal")}  # parts that a notebook is about
WIDTH, HEIGHT, TALL = 1120, 440, 74  # of the picture, and of a box
VISION, TEXT, MIDDLE = 70, 300, 185  # top of the boxes of each row


@cache
def facts() -> dict[str, str]:
    """Numbers in the picture, of the full-size model with the adapter of the paper."""
    with torch.device("meta"):
        model = medctkit.CTCLIPModel(medctkit.CTCLIPConfig())
    vision, text, slices = model.config.vision_config, model.config.text_config, model.preprocess_config.shape
    adapted = lora.add_lora(model, "paper")
    table, trained = (
        lora.parameter_table(adapted),
        [(n, p.numel()) for n, p in adapted.named_parameters() if p.requires_grad],
    )
    total = sum(size for _, size in trained)
    seeing = sum(size for name, size in trained if "visual_transformer" in name)
    depth, side = slices[0] // vision["temporal_patch_size"], slices[1] // vision["patch_size"]
    return {
        "scan": " × ".join(map(str, slices)),
        "patch": f"{vision['temporal_patch_size']} × {vision['patch_size']} × {vision['patch_size']} voxels",
        "grid": f"{depth} × {side} × {side} tokens",
        "spatial": f"{vision['spatial_depth']} spatial layers",
        "temporal": f"{vision['temporal_depth']} temporal layers",
        "codes": f"{vision['codebook_size']:,}",
        "bert": str(text["num_hidden_layers"]),
        "width": str(text["hidden_size"]),
        "projection": str(model.config.projection_dim),
        "vision": f"{seeing:,}",
        "text": f"{total - seeing:,}",
        "all": f"{total:,}",
        "share": f"{total / (table['total'].iloc[-1] + total):.2%}",
    }


def _text(x: float, y: float, words: str, size: int = 13, colour: str = INK, weight: str = "normal") -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}" font-weight="{weight}" '
        f'text-anchor="middle">{escape(words)}</text>'
    )


def _box(x: float, y: float, wide: float, lines: list[str], colour: str, here: bool, layers: bool = False) -> str:
    """A box with a title and lines below it; `layers` draws a pile."""
    frame = f'stroke="{ORANGE if here else "#90a4ae"}" stroke-width="{3 if here else 1}"'
    pile = [(8, -8), (4, -4)] if layers else []
    drawn = [
        f'<rect x="{x + dx}" y="{y + dy}" width="{wide}" height="{TALL}" rx="8" fill="{colour}" {frame}/>'
        for dx, dy in (*pile, (0, 0))
    ]
    first = y + TALL / 2 - 9 * (len(lines) - 1) + 5
    for i, line in enumerate(lines):
        drawn.append(
            _text(x + wide / 2, first + 18 * i, line, 14 if i == 0 else 12, weight="bold" if i == 0 else "normal")
        )
    return "".join(drawn)


def _tabs(x: float, y: float, names: tuple[str, ...]) -> str:
    """The adapter's tabs below a pile of layers."""
    drawn = []
    for i, name in enumerate(names):
        left = x + 8 + 46 * i
        drawn.append(f'<rect x="{left}" y="{y + TALL - 4}" width="42" height="22" rx="4" fill="{ORANGE}"/>')
        drawn.append(_text(left + 21, y + TALL + 11, name, 11, "white", "bold"))
    return "".join(drawn)


def _arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<path d="M{x1} {y1} L{x2} {y2}" stroke="{INK}" stroke-width="1.6" fill="none" marker-end="url(#tip)"/>'


def draw(here: tuple[str, ...] = ()) -> str:
    """The picture as SVG; the parts `here` are framed, and the caption says so."""
    f = facts()
    vision = [  # part, left, width, lines, colour, a pile of layers?
        ("scan", 14, 118, ["CT scan", f["scan"], "voxels in HU"], GREY, False),
        ("patches", 158, 142, ["patches", f["patch"], f["grid"]], BLUE, False),
        ("spatial", 326, 158, [f["spatial"], "tokens of one slab", "look at each other"], BLUE, True),
        ("temporal", 516, 158, [f["temporal"], "tokens at one place", "look along the slabs"], BLUE, True),
        ("quantiser", 706, 128, ["quantiser", f"nearest of {f['codes']}", "codes, frozen"], BLUE, False),
        ("projection", 860, 112, ["projection", f"to {f['projection']} numbers"], BLUE, False),
    ]  # fmt: skip
    text = [
        ("report", 14, 118, ["report", "or a sentence", "to ask with"], GREY, False),
        ("words", 158, 142, ["pieces of words", f"tokens of {f['width']}"], GREEN, False),
        ("bert", 326, 348, [f"BERT, {f['bert']} layers", "every token looks at every other"], GREEN, True),
        ("projection", 860, 112, ["projection", f"to {f['projection']} numbers"], GREEN, False),
    ]
    drawn = []
    for top, row in ((VISION, vision), (TEXT, text)):
        for (_, left, wide, *_), (_, right, *_) in zip(row, row[1:], strict=False):
            drawn.append(_arrow(left + wide + 2, top + TALL / 2, right - 3, top + TALL / 2))
        for part, left, wide, lines, colour, layers in row:
            drawn.append(_box(left, top, wide, lines, colour, part in here, layers))
    for left, top in ((326, VISION), (516, VISION)):
        drawn.append(_tabs(left, top, ("q", "k, v")))
    drawn.append(_tabs(326, TEXT, ("q", "k", "v")))
    cosine = 996
    drawn.append(_arrow(916, VISION + TALL + 2, cosine + 30, MIDDLE - 3))
    drawn.append(_arrow(916, TEXT - 3, cosine + 30, MIDDLE + TALL + 3))
    drawn.append(_box(cosine, MIDDLE, 112, ["cosine", "× temperature", "how well they fit"], GREY, "cosine" in here))
    drawn.append(_text(500, VISION + TALL + 42, f"LoRA, rank 24: {f['vision']} numbers", 13, ORANGE, "bold"))
    drawn.append(_text(500, TEXT + TALL + 42, f"LoRA, rank 24: {f['text']} numbers", 13, ORANGE, "bold"))
    drawn.append(_text(14 + 59, MIDDLE + 30, "frozen: all but", 12))
    drawn.append(_text(14 + 59, MIDDLE + 46, "the orange tabs", 12))
    title = f"CT-CLIP with LoRA in both encoders: {f['all']} numbers are trained, {f['share']}"
    drawn.append(_text(WIDTH / 2, 30, title, 17, weight="bold"))
    if here:
        drawn.append(_text(WIDTH - 190, 430, "framed in orange: you are here", 13, ORANGE, "bold"))
    tip = f'<path d="M0 0 L8 4 L0 8 z" fill="{INK}"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'font-family="Helvetica, Arial, sans-serif"><title>{escape(title)}</title>'
        f'<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">{tip}</marker></defs>'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>{"".join(drawn)}</svg>\n'
    )


def pictures() -> dict[str, str]:
    """The SVG of every file."""
    return {"architecture.svg": draw()} | {f"architecture_{name}.svg": draw(parts) for name, parts in HERE.items()}


def main(folder: Annotated[Path, typer.Argument(help="Where the pictures are written.", file_okay=False)]) -> None:
    """Draw CT-CLIP with its LoRA, whole and with what a notebook is about."""
    for name, svg in pictures().items():
        write_text(folder / name, svg)
        typer.echo(f"wrote {folder / name}")


if __name__ == "__main__":
    typer.run(main)
