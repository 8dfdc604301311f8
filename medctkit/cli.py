"""The `medctkit` command: what a cluster or a terminal needs, thin over the package."""

import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

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


if __name__ == "__main__":
    app()
