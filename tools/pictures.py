"""The pictures of phantoms in README, drawn by the kit itself: `python -m tools.pictures notebooks/images`."""

from pathlib import Path
from typing import Annotated

import typer

from medctkit.attention.maps import patch_map, relevance
from medctkit.common.atomic import replacing
from medctkit.findings import FINDINGS
from medctkit.model.base_model import load_mini_base
from medctkit.phantom.study import generate
from medctkit.scans.preprocessing import preprocess
from medctkit.viewers.drawing.rendering import finding_gallery
from medctkit.viewers.slice_viewer import SliceViewer

SHAPE = (80, 256, 256)


def draw_pictures(folder: Path) -> list[Path]:
    """Write `findings.png`, a phantom for each finding, and what `draw_viewer` does.

    Args:
        folder: made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    findings = folder / "findings.png"
    studies = [generate(30 + i, findings=[name], shape=SHAPE) for i, name in enumerate(FINDINGS)]
    with replacing(findings) as temporary:
        finding_gallery(studies).savefig(temporary, format="png", dpi=70, facecolor="black")

    return [findings, *draw_viewer(folder)]


def draw_viewer(folder: Path) -> list[Path]:
    """Write `viewer.png`, the slice viewer with a mask and a map, and `viewer.html`, its stack, for the site."""
    name, mini = "Pleural effusion", load_mini_base()
    study = generate(7, findings=["Lung nodule", name, "Lymphadenopathy"], shape=SHAPE)
    pixels = preprocess(study.volume, mini.preprocess_config)
    values = relevance(mini.model, mini.tokenizer, pixels, f"{name} is present.", f"{name} is not present.")
    times = "speaks for pleural effusion, times chance"
    speaks = patch_map(values * values.size, study.volume, mini.preprocess_config, times)
    slices = SliceViewer(study.volume, study.masks, height=420, heat_maps={"relevance": speaks}, canvas="plain")
    slices.mask_boxes[name].value = True
    return [slices.to_png(folder / "viewer.png"), slices.to_html(folder / "viewer.html", title="Phantom")]


def main(
    folder: Annotated[Path, typer.Argument(help="Where findings.png, viewer.png and viewer.html go.", file_okay=False)],
) -> None:
    """Draw README's pictures of phantoms: the 18 findings in two windows, and the slice viewer with mask and map."""
    for picture in draw_pictures(folder):
        typer.echo(f"wrote {picture}")


if __name__ == "__main__":
    typer.run(main)
