"""The `medctkit` command: what a cluster or a terminal needs, thin over the package."""

import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Annotated

import typer
from packaging.requirements import Requirement

from medctkit import demo

app = typer.Typer(no_args_is_help=True, add_completion=False, help="LoRA on 3D chest CT, from data to evaluation.")
app.command("demo")(demo.demo)

MINI_FILES = ("config.json", "model.safetensors", "tokenizer.json")


@app.callback()
def main() -> None:
    """LoRA on 3D chest CT, from data to evaluation."""


def check_versions() -> list[tuple[bool, str, str]]:
    """(fine, package, what was found) for every requirement of medctkit[notebooks]."""
    rows = []
    try:
        listed = requires("medctkit") or ()
    except PackageNotFoundError:
        return [(False, "medctkit", "runs from its folder, but is not installed")]
    for requirement in map(Requirement, listed):
        if requirement.marker and not requirement.marker.evaluate({"extra": "notebooks"}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            rows.append((False, requirement.name, f"missing, needs {requirement.specifier}"))
            continue
        fine = requirement.specifier.contains(found, prereleases=True)
        rows.append((fine, requirement.name, found if fine else f"{found}, needs {requirement.specifier}"))
    return sorted(rows, key=lambda row: row[1].lower())


def check_mini_model(folder: Path) -> tuple[bool, str, str]:
    """Whether the mini base model that ships with the package is complete."""
    missing = [name for name in MINI_FILES if not (folder / name).is_file()]
    found = f"{folder} lacks {', '.join(missing)}" if missing else str(folder)
    return not missing, "mini model", found


def describe_device() -> tuple[bool, str, str]:
    """The accelerator that torch would use; a CPU is fine."""
    try:
        import torch
    except ImportError as error:
        return False, "device", f"torch does not import: {error}"
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found = f"{torch.cuda.get_device_name()}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
    elif torch.backends.mps.is_available():
        found = "Apple GPU (mps)"
    else:
        found = "CPU (enough for the demo and all default notebooks)"
    return True, "device", f"{found}; {torch.get_num_threads()} threads of {os.cpu_count()} cores"


@app.command()
def doctor() -> None:
    """Look over this machine: versions, device, disk, model, data; exit with 1 if one needs mending."""
    real = os.environ.get("MEDCTKIT_REAL_CT")
    if real is None:
        real_row = (True, "own CT", "none (optional: set MEDCTKIT_REAL_CT to a folder of scans)")
    else:
        real_row = (Path(real).is_dir(), "own CT", f"MEDCTKIT_REAL_CT={real}")
    disk = shutil.disk_usage(Path.cwd())
    rows = [
        (sys.version_info >= (3, 11), "python", f"{platform.python_version()}, {sys.executable}"),
        (True, "system", platform.platform()),
        describe_device(),
        (True, "free disk", f"{disk.free / 2**30:.0f} GiB here"),
        check_mini_model(Path(__file__).parent / "assets" / "mini"),
        real_row,
        *check_versions(),
    ]
    for fine, name, found in rows:
        typer.echo(f"{'ok ' if fine else 'BAD'} {name:16} {found}")
    if not all(fine for fine, _, _ in rows):
        typer.echo("\nMend the lines marked BAD; for packages: make setup")
        raise typer.Exit(1)
    typer.echo("\nAll fine.")


Adapted = Annotated[Path, typer.Argument(help="Folder of the adaptation: adapter, history, metrics.")]
Manifest = Annotated[Path, typer.Option(help="The cohort.", exists=True, dir_okay=False)]
Seed = Annotated[int, typer.Option(help="Of the adapter's start, batches and wordings, and of the bootstrap.")]
Cache = Annotated[Path | None, typer.Option(help="Prepared volumes; OUTPUT_DIR/prepared if not given.")]
DEFAULT_MANIFEST = Path("data_manifest.csv")


@app.command()
def finetune(
    output_dir: Adapted, manifest: Manifest = DEFAULT_MANIFEST, seed: Seed = 0, cache_dir: Cache = None
) -> None:
    """Adapt the mini base model to the target hospital (phantom), as notebook 03 does."""
    from medctkit.experiment import adapt

    result = adapt(manifest, output_dir, seed, cache_dir=cache_dir)
    typer.echo(f"best validation AUROC {result.best_score:.3f} at step {result.best_step}: {result.adapter_dir}")


@app.command()
def evaluate(
    output_dir: Adapted, manifest: Manifest = DEFAULT_MANIFEST, seed: Seed = 0, cache_dir: Cache = None
) -> None:
    """Score base and adapted model on the target hospital's test patients (phantom), as notebook 04 does."""
    from medctkit.experiment import measure

    typer.echo(demo.result_table(measure(manifest, output_dir, seed, cache_dir)))


@app.command("manifest")
def write_default_manifest(
    path: Annotated[Path, typer.Argument(help="CSV to write.")] = DEFAULT_MANIFEST,
) -> None:
    """Write the default phantom cohort's manifest: about two minutes on two cores."""
    from medctkit.manifest import build_default_manifest, write_manifest

    typer.echo(f"wrote {write_manifest(build_default_manifest(), path)}")


@app.command()
def pretrain(
    output_dir: Annotated[
        Path, typer.Argument(help="Folder for the model; the shipped one is in medctkit/assets/mini.")
    ],
    pool_dir: Annotated[Path, typer.Option(help="Phantom studies (4 GB) and the checkpoint to resume from.")] = Path(
        "runs/pretraining"
    ),
) -> None:
    """Make the mini base model anew: on two cores about 15 minutes of phantoms and 45 of training."""
    from medctkit.pretrain import pretrain as run

    record = run(output_dir, pool_dir)
    typer.echo(f"validation AUROC {record['validation_auroc']:.3f} after {record['minutes']} min: {output_dir}")


@app.command()
def gallery(path: Annotated[Path, typer.Argument(help="PNG to write.")]) -> None:
    """Draw one phantom for each of the 18 findings, in lung and mediastinal windows."""
    from medctkit.findings import FINDINGS
    from medctkit.phantom import generate
    from medctkit.viewers import finding_gallery

    studies = [generate(30 + i, findings=[name], shape=(80, 256, 256)) for i, name in enumerate(FINDINGS)]
    finding_gallery(studies).savefig(path, dpi=70, facecolor="black")
    typer.echo(f"wrote {path}")


if __name__ == "__main__":
    app()
