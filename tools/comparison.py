"""What is shipped and written of a comparison: `python -m tools.comparison runs/comparison`.

Copies its results into the package, draws the pictures of the pages, and writes tables and sentences of
docs/comparison.md between their marks. Without a folder: from the results that the package has. A test holds the page
to them.
"""

import re
import shutil
import sys
from pathlib import Path

from medctkit.common.atomic import replacing, write_text
from medctkit.experiments.compare.figures import write_figures
from medctkit.experiments.compare.results import SAVED, Results, load_results
from medctkit.experiments.compare.runs import GROUPS
from medctkit.experiments.compare.tables import TABLES, all_tables, best_free_texts, missing, shown, verdict

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "comparison.md"
FILES = ("comparison.csv", "draws.npz", "costs.csv", "diverged.csv")
MARK = re.compile(r"<!-- (\w+): begin -->\n.*?<!-- \1: end -->", re.S)
SAID = {  # under a table: pairs that are compared in words
    "loss": [("lora", f"lora, {name}", where) for where in ("", "/home") for name in ("prevalence", "contrastive")],
    "placement": [(name, "lora", "") for name in ("lora-mlp", "lora-all", "lora-vision", "lora-text")],
    "methods": [
        (name, "lora", "") for name in ("full", "dora", "rslora", "lora+", "pissa", "oft", "vera", "ia3", "bitfit")
    ],
    "forgetting": [("lora", "base", "/home"), ("full", "base", "/home"), ("lora", "full", "/home")]
    + [(f"lora, {name}", "lora", where) for where in ("/home", "") for name in ("replay", "anchor-1", "anchor-10")],
}  # fmt: skip
PICTURES = {
    "rivals": "Mean AUROC of free fixes, of rivals and of LoRA",
    "methods": "Mean AUROC against the number of trained parameters",
    "forgetting": "Gain at the target hospital against loss at the source hospital",
    "studies": "Mean AUROC against the number of training studies",
}


def block(name: str, results: Results) -> str:
    """What stands between the marks of a name: `runs`, or one of `TABLES`."""
    if name == "runs":
        runs = results.runs[results.runs["group"].isin(GROUPS)]
        steps, seeds = runs["steps"].dropna().unique(), runs["seed"].nunique()
        return f"{runs['name'].nunique()} runs of {steps[0]:.0f} steps, {seeds} seeds. {missing(results)}".strip()
    tables = all_tables(results)
    if name not in tables:
        return f"Not measured yet: `medctkit compare runs/comparison --only {TABLES[name].group}`."
    rows = shown(tables[name], TABLES[name].columns)
    lines = [f"| {' | '.join(map(str, row))} |" for row in (rows.columns, ["---"] * rows.shape[1], *rows.to_numpy())]
    said = [TABLES[name].note] if TABLES[name].note else []
    said += best_free_texts(results) if name == "rivals" else []
    for one, other, what in SAID.get(name, ()):
        try:
            at = "At home: " if what else ""
            said.append(f"{at}{verdict(results, TABLES[name].group, one, other, what)}")
        except ValueError:
            continue
    picture = [f"![{PICTURES[name]}, phantoms](../notebooks/images/{name}.png)", ""] if name in PICTURES else []
    return "\n".join([*picture, *lines, "", *(f"- {line}" for line in said)]).strip()


def written(text: str, results: Results) -> str:
    """A page with all that stands between marks made anew."""
    return MARK.sub(
        lambda found: f"<!-- {found[1]}: begin -->\n{block(found[1], results)}\n<!-- {found[1]}: end -->", text
    )


def main(folder: Path | None = None) -> None:
    """Copy the results of `folder`, if there is one, then draw and write."""
    results = load_results(folder or SAVED)  # before anything is copied
    for name in FILES if folder else ():
        if (folder / name).is_file():
            with replacing(SAVED / name) as temporary:
                shutil.copyfile(folder / name, temporary)
    pictures = write_figures(results, ROOT / "notebooks" / "images")
    write_text(PAGE, written(PAGE.read_text(encoding="utf-8"), results))
    print(f"{PAGE.relative_to(ROOT)}; {', '.join(path.name for path in pictures)}. {missing(results)}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
