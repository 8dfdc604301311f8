"""The commands that make what comes with the kit; `cli` hands them on as its own, in a group apart."""

from pathlib import Path
from typing import Annotated

import typer

from medctkit.cli_deploy import say

maintaining = typer.Typer(add_completion=False)
PANEL = "For maintainers"


@maintaining.command("manifest", rich_help_panel=PANEL)
def write_default_manifest(
    path: Annotated[Path, typer.Argument(help="CSV to write.")] = Path("data_manifest.csv"),
) -> None:
    """Write the default phantom cohort's manifest: about two minutes on two cores."""
    from medctkit.cohort.manifest import build_default_manifest, has_file, load_manifest, write_manifest

    if path.exists() and any(map(has_file, load_manifest(path).to_dict("records"))):
        raise ValueError(f"{path} is there and lists real scans; give another name")
    say(f"wrote {write_manifest(build_default_manifest(), path)}")


@maintaining.command(rich_help_panel=PANEL)
def pretrain(
    output_dir: Annotated[
        Path, typer.Argument(help="For the model; the shipped one is in medctkit/assets/mini.", file_okay=False)
    ],
    pool_dir: Annotated[Path, typer.Option(help="Phantom studies (5.6 GB) and the checkpoint.")] = Path(
        "runs/pretraining"
    ),
) -> None:
    """Make the mini base model anew: four minutes on a GPU, hours on two cores, after the phantoms are drawn.

    Stop it and start it again as you like.
    """
    from medctkit.experiments.pretrain import pretrain as run

    record = run(output_dir, pool_dir)
    say(f"validation AUROC {record['validation_auroc']:.3f} after {record['minutes']} min: {output_dir}")


@maintaining.command(rich_help_panel=PANEL)
def gallery(
    folder: Annotated[Path, typer.Argument(help="Where the pages are written.", file_okay=False)],
    real: Annotated[
        Path | None, typer.Option(help="A real scan: one page more, beside a phantom.", exists=True)
    ] = None,
) -> None:
    """Draw pages to judge phantoms by: each finding in three planes, beside the same patient without it."""
    from medctkit.viewers.gallery import draw_beside_real, draw_twins

    pages = draw_twins(folder)
    for page in [*pages, *([draw_beside_real(folder / "beside_real.png", real)] if real else [])]:
        say(f"wrote {page}")
