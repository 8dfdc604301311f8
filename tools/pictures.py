"""README's pictures of phantoms and the cover, drawn by the kit itself: `python -m tools.pictures notebooks/images`."""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from matplotlib.figure import Figure

from medctkit.attention.maps import patch_map, relevance
from medctkit.common.atomic import replacing
from medctkit.experiments.compare.results import finding_table, load_results
from medctkit.findings import FINDINGS
from medctkit.model.base_model import load_mini_base
from medctkit.phantom.study import PhantomStudy, generate
from medctkit.scans.preprocessing import preprocess
from medctkit.viewers.drawing.rendering import MASK_COLOURS, finding_gallery
from medctkit.viewers.slice_viewer import SliceViewer

SHAPE = (80, 256, 256)
SHOWN = "Pleural effusion"  # outlined in the viewer


def draw_pictures(folder: Path) -> list[Path]:
    """Write `cover.png`, `findings.png`, a phantom for each finding, and what `draw_viewer` does.

    Args:
        folder: made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    findings = folder / "findings.png"
    studies = [generate(30 + i, findings=[name], shape=SHAPE) for i, name in enumerate(FINDINGS)]
    with replacing(findings) as temporary:
        finding_gallery(studies).savefig(temporary, format="png", dpi=84, facecolor="black")
    study = generate(7, findings=["Lung nodule", SHOWN, "Lymphadenopathy"], shape=SHAPE)
    return [draw_cover(study, folder), findings, *draw_viewer(study, folder)]


def draw_cover(study: PhantomStudy, folder: Path) -> Path:
    """Write `cover.png`: three planes of a phantom, and the AUROC of each finding before and after LoRA."""
    slices = SliceViewer(study.volume, study.masks, height=640, canvas="plain")
    slices.mask_boxes[SHOWN].value = True
    table = finding_table(load_results()).drop(index="mean").sort_values("lora")
    figure, heights = Figure((16, 6.5), facecolor="black", layout="constrained"), range(len(table))
    left, right = figure.subplots(1, 2, width_ratios=(1.9, 1))
    left.imshow(slices.picture())
    left.axis("off")
    right.axvline(0.5, color="grey", linewidth=0.8)
    after, before = (np.array(colour) / 255 for colour in MASK_COLOURS[:2])
    right.hlines(heights, table["base"], table["lora"], color=after, linewidth=2)
    for name, label, colour in (("base", "the base model", before), ("lora", "after LoRA", after)):
        right.scatter(table[name], heights, color=[colour], s=42, zorder=3, label=label)
    right.set_facecolor("black")
    right.tick_params(colors="white", labelsize=11)
    right.set_yticks(heights, table.index)
    right.set_xlabel("AUROC on test phantoms; 0.5 is chance", color="white", fontsize=11)
    right.legend(facecolor="black", labelcolor="white", edgecolor="grey", loc="lower right", fontsize=11)
    with replacing(folder / "cover.png") as temporary:
        figure.savefig(temporary, format="png", dpi=80)
    return folder / "cover.png"


def draw_viewer(study: PhantomStudy, folder: Path) -> list[Path]:
    """Write `viewer.png`, the slice viewer with a mask and a map, and `viewer.html`, its stack, for the site."""
    mini = load_mini_base()
    pixels = preprocess(study.volume, mini.preprocess_config)
    values = relevance(mini.model, mini.tokenizer, pixels, f"{SHOWN} is present.", f"{SHOWN} is not present.")
    times = f"speaks for {SHOWN.lower()}, times chance"
    speaks = patch_map(values * values.size, study.volume, mini.preprocess_config, times)
    slices = SliceViewer(study.volume, study.masks, height=420, heat_maps={"relevance": speaks}, canvas="plain")
    slices.mask_boxes[SHOWN].value = True
    return [slices.to_png(folder / "viewer.png"), slices.to_html(folder / "viewer.html", title="Phantom")]


def main(
    folder: Annotated[
        Path, typer.Argument(help="Where cover.png, findings.png, viewer.png and viewer.html go.", file_okay=False)
    ],
) -> None:
    """Draw README's pictures: the cover, the 18 findings, and the slice viewer with mask and map."""
    for picture in draw_pictures(folder):
        typer.echo(f"wrote {picture}")


if __name__ == "__main__":
    typer.run(main)
