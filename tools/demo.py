"""`make demo`: the paper's story on this machine, by running the lessons themselves.

Executes notebooks 01 to 04 in order, leaves each as a page that needs no kernel and no network, with `index.html` to
open first, and prints the table that notebook 04 measured.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from medctkit.cli import told
from medctkit.metrics.scores import result_table
from tools.notebooks import ROOT, execute, this_interpreter_as_kernel
from tools.offline_pages import with_stacks_kept, write_index, write_page

NOTEBOOKS = (
    "01_data_prep.ipynb",
    "02_lora_injection.ipynb",
    "03_finetuning.ipynb",
    "04_zero_shot_evaluation.ipynb",
)
NOTEBOOKS_DIR = ROOT / "notebooks"


def execute_all(notebooks: Sequence[Path], output_dir: Path, seed: int) -> dict:
    """Run `notebooks` in order, stopping at the first failure, and return the metrics that notebook 04 wrote.

    Raises:
        FileNotFoundError: a notebook is not there, or none of them wrote metrics.json.
        RuntimeError: a cell failed.
    """
    import nbformat

    missing = [str(path) for path in notebooks if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"no notebook {', '.join(missing)}. The notebooks come with a clone of the repository, not with "
            "the installed package: run this from a clone, or name their folder with --notebooks-dir."
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    metrics = output_dir / "metrics.json"
    metrics.unlink(missing_ok=True)  # an earlier run's figures must not pass for this one's
    with this_interpreter_as_kernel():
        parameters, pages = {"output_dir": str(output_dir), "seed": seed}, {}
        for path in notebooks:
            executed = output_dir / path.name
            nbformat.write(with_stacks_kept(path, output_dir), executed)
            execute(executed, executed, parameters, path.parent)
            page, picture = write_page(path, executed, parameters, [lesson.name for lesson in notebooks])
            pages[page] = picture
    found = json.loads(metrics.read_text(encoding="utf-8"))
    print(f"\nTo read in a browser: {write_index(output_dir, found, pages)}")
    return found


def demo(
    output_dir: Annotated[Path, typer.Option(help="Where everything is written.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of the adaptation and the bootstrap.")] = 0,
    notebooks_dir: Annotated[Path, typer.Option(help="Where the notebooks are.")] = NOTEBOOKS_DIR,
) -> None:
    """Run notebooks 01-04 on synthetic patients: no download, no GPU; then print what was measured."""
    start = time.perf_counter()
    output_dir = output_dir.resolve()
    paths = [notebooks_dir / name for name in NOTEBOOKS]
    print(
        f"Running {len(paths)} notebooks on synthetic chest CT. It needs no GPU and no network.\n"
        f"They take about 11 minutes on two CPU cores. Writes to {output_dir}\n",
        flush=True,
    )
    with told():
        metrics = execute_all(paths, output_dir, seed)
    print("\nTarget hospital, test patients, by prompts: base (zero-shot) and LoRA (supervised) [95 % interval]\n")
    print(result_table(metrics))
    minutes, seconds = divmod(round(time.perf_counter() - start), 60)
    print(f"\nFigures: {output_dir / 'metrics.json'}\nDone in {minutes} min {seconds:02d} s.")


if __name__ == "__main__":
    typer.run(demo)
